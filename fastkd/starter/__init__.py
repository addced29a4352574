"""`fastkd init`: a first recipe for a teacher and some data."""

from fastkd.starter.recipe import first_recipe

__all__ = ["first_recipe"]
