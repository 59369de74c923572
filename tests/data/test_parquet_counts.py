"""The counts in a Parquet file's footer against pyarrow's own reading of them."""

from __future__ import annotations

import numpy as np
import pytest

from iql_torchrl.data.sources.parquet_counts import counts_of

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("version", ["1.0", "2.6"])
@pytest.mark.parametrize("groups", [1, 7, 1000])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_the_counts_are_those_that_pyarrow_reads(compression, groups, version, tmp_path):
    random = np.random.default_rng(0)
    rows = 300
    table = pa.table(
        {
            "lists": pa.array(random.normal(size=(rows, 3)).tolist()),
            "nested.name": pa.array([[[1.0], []]] * rows),
            "flags": pa.array(random.random(rows) < 0.5),
            "numbers": pa.array(random.integers(0, 9, rows), pa.int32()),
            "texts": pa.array(["a", None, "c"] * (rows // 3)),
            "records": pa.array([{"x": 1, "y": "z"}] * rows),
        }
    )
    path = tmp_path / "log.parquet"
    pq.write_table(table, path, row_group_size=max(1, rows // groups), compression=compression, version=version)
    metadata = pq.ParquetFile(path).metadata
    found = counts_of(path)
    assert found.rows == rows
    assert found.rows_of_groups == [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    expected = {}
    widths = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8}
    for index in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(index).column(number)
            name = next(one for one in table.column_names if column.path_in_schema.startswith(one))
            expected[name] = expected.get(name, 0) + column.num_values * widths.get(column.physical_type, 16)
    assert found.sizes == expected


@pytest.mark.parametrize(
    "damage", [b"", b"PAR1", b"PAR1PAR1", bytes(100), b"\xff\xff\xff\xffPAR1", b"\x15\x04PAR1" * 9]
)
def test_a_footer_that_is_none_is_refused(damage, tmp_path):
    (tmp_path / "log.parquet").write_bytes(damage)
    with pytest.raises((ValueError, KeyError, IndexError, TypeError)):
        counts_of(tmp_path / "log.parquet")
