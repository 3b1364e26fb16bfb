"""vmm: pretrain video models with their sound and their text, in JAX.

    bytes → clip → tokens → encoders → fusion → objectives → step → checkpoint → eval → publish

A published model loads and embeds in three lines:

    import vmm
    model = vmm.load("runs/demo/published")
    model.embed(video="clip.mp4", text="a red circle moves left")
"""

__version__ = "0.1.0"


def load(source: str, base=None, plugins=()):
    """Returns the model in a folder, or in a Hugging Face Hub repository ("owner/name[@revision]"; old ones have no owner).

    A folder of `vmm publish` or `vmm convert`, a run, or one in the published layout of a known family (config.json
    + safetensors: VideoMAE, CLIP, BERT, …; see README).
    Adapters (`vmm publish --adapters`) are put on their base: `base`, given as `init_from`, else where it was in training.

    plugins: modules of your own environment that may be imported, where the model has a kind that is named by its import
    path ("mypackage.fusion:MyFusion"); else nothing is, and such a model is refused.

    Raises:
      vmm.errors.UserError: there is none, it is not whole, or its adapters are of another base. Nothing is ever unpickled.
    """
    from vmm.publish import load_published  # imports JAX: only when it is needed

    return load_published(source, base, plugins)
