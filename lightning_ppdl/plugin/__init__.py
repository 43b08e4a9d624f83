"""A participant inside a Lightning Trainer, whichever of Lightning's two packages it is of.

The classes here are mixins without a Lightning base; :mod:`lightning_ppdl.pytorch_lightning` and
:mod:`lightning_ppdl.lightning` each make the strategies and callbacks of one package out of them.
"""
