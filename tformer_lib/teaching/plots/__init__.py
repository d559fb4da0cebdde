"""One file a chapter, named for its topic: functions that draw its figures with :mod:`tformer_lib.teaching.style`.

A function takes data, draws, and ends with ``style.show()``; it returns nothing, so that a cell shows the figure alone.
"""
