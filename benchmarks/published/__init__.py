"""Published measurements as cases: reading, completing and converting the rows of a table."""

from .cases import cases_of, scored
from .impute import counts, table
from .read import read_rows
from .row import MEMORY_KINDS, PublishedRow

__all__ = ["MEMORY_KINDS", "PublishedRow", "cases_of", "counts", "read_rows", "scored", "table"]
