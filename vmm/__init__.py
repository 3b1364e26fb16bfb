"""vmm: pretrain video models with their sound and their text, in JAX.

    bytes → clip → tokens → encoders → fusion → objectives → step → checkpoint → eval → publish

A published model loads and embeds in three lines:

    import vmm
    model = vmm.load("runs/demo/published")
    model.embed(video="clip.mp4", text="a red circle moves left")
"""

__version__ = "0.1.0"


def load(source: str):
    """Returns the model in a folder, or in a Hugging Face Hub repository ("owner/name[@revision]").

    A folder of `vmm publish` or `vmm convert`, a run, or one in the published layout of a known family (config.json
    + safetensors: VideoMAE, CLIP, BERT, …; see README).

    Raises:
      vmm.errors.UserError: there is none, or it is not whole. Nothing is ever unpickled.
    """
    from vmm.publish import load_published  # imports JAX: only when it is needed

    return load_published(source)
