"""Tables of any format as batches of Arrow columns: parquet, Arrow, JSON, csv, product feeds, folders, patterns, hub data sets."""

from mmsid.catalog.sources.batch import Batch
from mmsid.catalog.sources.literal_cells import literal_cell
from mmsid.catalog.sources.locate import Source, local_files
from mmsid.catalog.sources.opened import OpenedTable, open_table

__all__ = ["Batch", "OpenedTable", "Source", "literal_cell", "local_files", "open_table"]
