"""What every encoder declares: nobody outside its file asks which kind it is."""

import flax.linen as nn
import numpy as np

from vmm.data.spec import DataSpec


class Encoder(nn.Module):
    """Base of encoders."""

    @nn.nowrap
    def check(self, where: str, data: DataSpec) -> None:
        """Raises UserError where it does not fit what the data gives. where: its key in the config."""

    @nn.nowrap
    def unpatch(self, values: np.ndarray, grid: tuple) -> np.ndarray:
        """Returns the array that patches [N P] in their order were cut of: pixels [T H W C], or a spectrogram [F M]."""
        raise NotImplementedError
