"""Token ids of the probe queries: a few of each of the paper's data sets, the same at every point of a launcher."""

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tunescope import dataset_files as files
from tunescope.config import PAPER_DATASETS
from tunescope.models import folder, tokenizer
from tunescope.train.engine import synthetic_queries
from tunescope.train.workload import Workload

NUM_QUERIES = 32
NUM_QUERIES_TINY = 8


def probe_queries(
    workload: Workload,
    model_dir: Path,
    data_files: Mapping[str, Path] | None = None,
    num_queries: int | None = None,
) -> dict[str, list[list[int]]]:
    """Data set (`cs`, `math`) -> token ids of each query, as training would read, template and cut it.

    model_dir: the point's own model folder, with its tokenizer; it exists once the engine has prepared the run.
    data_files: data set -> its file, whose first queries are taken; other data sets get synthetic queries.
    num_queries: of each data set; None: NUM_QUERIES, or NUM_QUERIES_TINY for preset tiny.

    Point and batch size change nothing in it, and neither does the data set that the point trains on.
    Raises UserError for a file that the engine could not read.
    """
    if num_queries is None:
        num_queries = NUM_QUERIES_TINY if workload.point.preset == "tiny" else NUM_QUERIES
    probes = {}
    for dataset in PAPER_DATASETS:
        file = (data_files or {}).get(dataset)
        if file is not None:
            entry = files.check_dataset_file(file).entry
            rows = files.load_rows(file)
            columns = {name for row in rows for name in row}
            # A column that some rows lack is empty in them once the engine has read the file.
            rows = [{name: row.get(name) for name in columns} for row in rows[:num_queries]]
        else:
            entry = {}
            rows = _synthetic_rows(workload, dataset, model_dir, num_queries)
        probes[dataset] = _encode(workload.recipe, entry, rows, model_dir)
    return probes


def _synthetic_rows(workload: Workload, dataset: str, model_dir: Path, num_queries: int) -> list[dict[str, Any]]:
    source = workload.model_dir
    has_tokenizer = source is not None and folder.holds_tokenizer(Path(source))
    of_dataset = replace(
        workload, point=replace(workload.point, dataset=dataset, seq_len_tokens=None), num_samples=num_queries
    )
    return list(synthetic_queries(of_dataset, model_dir, "checkpoint" if has_tokenizer else tokenizer.KIND))


def _encode(
    recipe: Mapping[str, Any], entry: Mapping[str, Any], rows: list[dict[str, Any]], model_dir: Path
) -> list[list[int]]:
    """Token ids (rows, any length) by the engine's own steps: format, template, tokenizer, cut.

    entry: LLaMA-Factory's description of the rows' format; empty for its default, alpaca.
    """
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.converter import get_dataset_converter
    from llamafactory.data.parser import DatasetAttr
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.hparams import DataArguments

    settings = {field.name: recipe[field.name] for field in fields(DataArguments) if field.name in recipe}
    arguments = DataArguments(**settings)
    loaded = AutoTokenizer.from_pretrained(model_dir)
    template = get_template_and_fix_tokenizer(loaded, arguments)
    attributes = DatasetAttr("file", dataset_name="probe")
    attributes.join(dict(entry))
    convert = get_dataset_converter(attributes.formatting, attributes, arguments)
    converted = [convert(row) for row in rows]
    columns = {name: [row[name] for row in converted] for name in converted[0]}
    processor = SupervisedDatasetProcessor(template=template, tokenizer=loaded, processor=None, data_args=arguments)
    return processor.preprocess_dataset(columns)["input_ids"]
