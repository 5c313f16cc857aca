"""STUB"""

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mmsid.catalog.tables import Cells, Table, read_table_rows, table_pieces


@dataclass
class Batch:
    rows: Table
    file: Path
    numbers: object

    def __len__(self):
        return len(self.rows.rows)


class OpenedTable:
    def __init__(self, source, config_key):
        self.source, self.key = source, config_key
        t = read_table_rows(source, [], config_key=config_key)
        self.columns, self.files, self.notes, self.num_rows = tuple(t.columns), (Path(source),), [], len(t.rows)

    def batches(self, selected, rows=65536):
        for t in table_pieces(self.source, selected, rows, config_key=self.key)[1]:
            yield Batch(t, Path(self.source), t.numbers)


def open_table(source, *, config_key):
    return OpenedTable(source, config_key)
