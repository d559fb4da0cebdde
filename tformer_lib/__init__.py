"""TFormer Lab: a Transformer built from an empty file, then made fast.

One topic, one word, one file: the module that a chapter explains has the chapter's name
(``tformer_lib.masks``, ``tformer_lib.attention``, ...). Nothing is imported here, so that
``import tformer_lib`` is quick; import the module you want.
"""

__version__ = "0.1.0"
