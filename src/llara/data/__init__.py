"""Readers and writers: whatever the format, the same records come out, and a bad line is named by file and line."""

from llara.data.collections import Collection as Collection
from llara.data.collections import open_collection as open_collection
from llara.data.collections import read_qrels as read_qrels
from llara.data.collections import read_queries as read_queries
from llara.data.documents import parse_document as parse_document
from llara.data.documents import read_documents as read_documents
from llara.data.examples import collection_examples as collection_examples
from llara.data.examples import read_examples as read_examples
from llara.data.judged import Judged as Judged
from llara.data.judged import read_judged as read_judged
from llara.data.rows import Row as Row
from llara.data.rows import read_rows as read_rows
from llara.data.runs import Run as Run
from llara.data.trec import rank_hits as rank_hits
from llara.data.trec import read_run as read_run
from llara.data.trec import write_run as write_run
