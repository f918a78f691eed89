"""The folder of the Data Docs, as Great Expectations writes it, with its pages in an order of their own."""

from __future__ import annotations

from great_expectations.data_context.store.tuple_store_backend import TupleFilesystemStoreBackend


class SortedFolder(TupleFilesystemStoreBackend):
    """A folder whose pages are listed by name. Otherwise the index has the order of the file system, which differs."""

    def list_keys(self, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        return sorted(super().list_keys(prefix))
