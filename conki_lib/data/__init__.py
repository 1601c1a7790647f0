"""Data: corpora are fetched or converted into packed stores, and read from those only."""

from conki_lib.data.batch import Batch, make_loader, tokenise
from conki_lib.data.corpora import CORPORA, fetch
from conki_lib.data.formats import convert
from conki_lib.data.mmsa import export_mmsa
from conki_lib.data.store import FeatureStore, Utterance, open_store
from conki_lib.disk import corpus_path

__all__ = [
    "CORPORA",
    "Batch",
    "FeatureStore",
    "Utterance",
    "convert",
    "corpus_path",
    "export_mmsa",
    "fetch",
    "make_loader",
    "open_store",
    "tokenise",
]
