"""A CoCa (Yu et al. 2022, arXiv:2205.01917) without its decoder of captions: a CLIP."""

import copy
import dataclasses

from .model import ClipModel, create_from

_DECODER = "multimodal_cfg"


def as_clip(clip: ClipModel) -> ClipModel:
    """The two towers of a CoCa, which embed as they did; any other model as it is."""
    if _DECODER not in clip.config:
        return clip
    config = copy.deepcopy({k: v for k, v in clip.config.items() if k != _DECODER})
    config["custom_text"] = True
    for tower in ("vision_cfg", "text_cfg"):
        config[tower]["output_tokens"] = False  # the decoder alone wants them
    made = create_from(config, f"{clip.name}-towers")
    state = clip.model.state_dict()
    made.model.load_state_dict({k: state[k] for k in made.model.state_dict()})
    return dataclasses.replace(clip, model=made.model, config=config)
