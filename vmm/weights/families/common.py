"""What several families share: the statistics of images, and names of activations."""

from collections.abc import Mapping

from vmm.errors import UserError, one_of

# Of ImageNet's colours, in pixel values 0 … 255; and of CLIP's, and of families that only bring pixels to −1 … 1.
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_DEVIATION = (0.229 * 255, 0.224 * 255, 0.225 * 255)
CLIP_MEAN = (0.48145466 * 255, 0.4578275 * 255, 0.40821073 * 255)
CLIP_DEVIATION = (0.26862954 * 255, 0.26130258 * 255, 0.27577711 * 255)
UNIT = ((0.0,) * 3, (255.0,) * 3)  # pixels 0 … 1
HALF = (127.5, 127.5, 127.5)

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
}


def activation_of(name: str) -> str:
    """Returns our name of a `hidden_act` of config.json."""
    if name not in _ACTIVATIONS:
        raise UserError(f"config.json hidden_act: {name!r} is not known here; {one_of(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def activation_to(name: str) -> str:
    """Returns config.json's `hidden_act` of our name."""
    return {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "gelu_quick": "quick_gelu", "relu": "relu"}[name]


def require(config: Mapping, family: str, **expected) -> None:
    """Checks settings of config.json that a model of ours cannot have otherwise: key → the one value that is known.

    A key that is not there is at its family's default, which is the value known.

    Raises:
      UserError: a setting has another value.
    """
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"config.json {key}: {family} is read with {value!r} only, got {config[key]!r}")


def square(config: Mapping, key: str) -> int:
    """Returns a size of config.json that is one number, or two that are the same. Raises UserError: they differ."""
    sizes = config[key] if isinstance(config[key], (list, tuple)) else [config[key]]
    if len(set(sizes)) != 1:
        raise UserError(f"config.json {key}: must be square, got {sizes}")
    return sizes[0]


def transformer(config: Mapping) -> dict:
    """Returns the fields that an encoder of ours has of the usual keys of config.json."""
    return dict(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        ratio=config["intermediate_size"] / config["hidden_size"],
        block=dict(activation=activation_of(config["hidden_act"]), epsilon=config["layer_norm_eps"]),
    )


def transformer_to(encoder: Mapping) -> dict:
    """Returns those keys of config.json, of an encoder's or decoder's fields."""
    return dict(
        hidden_size=encoder["width"],
        num_hidden_layers=encoder["depth"],
        num_attention_heads=encoder["heads"],
        intermediate_size=round(encoder["ratio"] * encoder["width"]),
        hidden_act=activation_to(encoder["block"]["activation"]),
        layer_norm_eps=encoder["block"]["epsilon"],
    )


def late(encoder: Mapping) -> dict:
    """Returns the fusion of a model whose streams do not meet: none."""
    return dict(kind="late", width=encoder["width"], depth=0, heads=encoder["heads"])


def margin(size: int) -> float:
    """Returns the share of a picture's shorter side that is cut out, of processors that cut 224 of 256 pixels."""
    return size / (size * 256 // 224)


def video_model(encoder: Mapping, frames: int, size: int, crop: float = 1.0, **clip) -> dict:
    """Returns the model of a video encoder alone, for clips of so many frames of size × size. clip: further fields of it."""
    return dict(
        trunk=dict(encoders=dict(video=encoder), fusion=late(encoder)),
        views={},
        objectives={},
        clip=dict(frames=frames, size=size, crop=crop, **clip),
    )


def classifier(config: Mapping) -> dict:
    """Returns the parts of a model that a linear classifier of the first token is: views, objectives, labels, classes."""
    # Two classes are the default of config.json, and then not written down.
    names = config.get("id2label") or {i: f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    try:
        names = [str(names[key]) for key in sorted(names, key=int)]
    except (TypeError, ValueError, AttributeError):
        raise UserError("config.json id2label: expected number → name of a class") from None
    labels = {"label": len(names)}
    return dict(
        views=dict(clean={}),
        objectives=dict(classes=dict(kind="classify", labels=labels, pooling="first")),
        labels=labels,
        classes={"label": names},
    )


def classifier_to(model: Mapping) -> dict:
    """Returns config.json's keys of that objective, with the names of its classes."""
    count = model["objectives"]["classes"]["labels"]["label"]
    names = (model.get("classes") or {}).get("label") or [f"LABEL_{i}" for i in range(count)]
    if len(names) != count:
        raise UserError(f"classes.label: {len(names)} names of {count} classes; give each one a name")
    return dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})


def agree(spec: Mapping, where: str, family: str, **expected) -> None:
    """Checks fields of an objective that a published layout cannot say otherwise. Raises UserError: another value."""
    for key, value in expected.items():
        if spec[key] != value:
            raise UserError(f"export to {family}: {where}.{key} must be {value!r}, got {spec[key]!r}")
