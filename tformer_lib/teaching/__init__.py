"""What the chapters need to show things: figures, interactive figures, library source, measured results, exercises.

A notebook opens with::

    from tformer_lib import teaching
    teaching.setup()

This is the only package of the library that imports matplotlib, ipywidgets or IPython.
"""

from tformer_lib.teaching.display import results, show_source, under
from tformer_lib.teaching.exercises import progress
from tformer_lib.teaching.my_gpt import capstone
from tformer_lib.teaching.running import SENTENCE, STORY, model_map
from tformer_lib.teaching.style import measured, setup, show
from tformer_lib.teaching.widgets.real_models import chat

__all__ = [
    "SENTENCE",
    "STORY",
    "capstone",
    "chat",
    "measured",
    "model_map",
    "progress",
    "results",
    "setup",
    "show",
    "show_source",
    "under",
]
