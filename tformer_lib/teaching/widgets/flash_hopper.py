"""The interactive figure of chapter 17: schedules of step 4, and when its tensor cores wait."""

from tformer_lib.teaching.widgets import Interactive, module


class PipelineExplorer(Interactive):
    """Choose a schedule and the times of its parts, and see when the tensor cores stand idle."""

    _esm = module("flash_hopper.js")


def pipeline(presets: dict[str, dict[str, int]]) -> PipelineExplorer:
    """The explorer of schedules.

    Args:
        presets: name -> cycles of one matrix multiplication of a warpgroup ("product"), of its softmax ("softmax"),
            and of loading one tile of K or V ("load").
    """
    return PipelineExplorer(
        label="Pipeline explorer: when do the tensor cores wait?",
        data={"tiles": 24, "shown": 4, "presets": list(presets.items())},
    )
