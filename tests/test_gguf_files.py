"""GGUF files read fast: what gguf's own reader finds, once a file, and damage is told as such."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import transformers

from omnilora.errors import BadValue
from omnilora.training.config import TrainConfig
from omnilora.training.gguf_files import _reader, gguf_read_fast
from omnilora.training.models import load_model


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint32("some.number", 7)
    writer.add_bool("some.truth", True)
    writer.add_float64("some.fraction", 0.25)
    writer.add_string("some.text", "grüße")
    writer.add_array("some.words", ["a", "", "ß", "long " * 50, *map(str, range(100))])
    writer.add_array("some.whole", list(range(-5, 60)))
    writer.add_array("some.real", [0.5, -1.0, 1e30])
    writer.add_array("some.yes", [True, False, True])
    writer.add_tensor("token_embd.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def found(reader):
    fields = {n: (f.offset, f.types, f.data, [p.tolist() for p in f.parts], f.contents()) for n, f in reader.fields.items()}
    return fields, [(t.name, t.tensor_type, t.shape.tolist(), t.data_offset, t.data.tolist()) for t in reader.tensors]


def test_it_finds_what_ggufs_own_reader_finds(path):
    fast, own = _reader()(path), gguf.GGUFReader(path)
    assert found(fast) == found(own)
    assert all(p.dtype == q.dtype for n, f in own.fields.items() for p, q in zip(fast.fields[n].parts, f.parts, strict=True))


def test_a_file_is_read_once_inside_and_nothing_stays_changed(path):
    own = gguf.GGUFReader, gguf.get_tensor_name_map
    with gguf_read_fast():
        assert gguf.GGUFReader(str(path)) is gguf.GGUFReader(str(path))
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is table
        inside = gguf.GGUFReader
        assert issubclass(inside, own[0]) and isinstance(inside(path), own[0])
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == own
    assert inside(path) is not inside(path)  # who kept it gets new ones: the file may have changed


def test_a_file_cut_anywhere_in_its_header_is_told(path):
    whole = path.read_bytes()
    end = _reader()(path).tensors[0].data_offset
    for size in range(1, end, 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            _reader()(path)


def test_a_damaged_file_is_not_remembered(path):
    whole = path.read_bytes()
    with gguf_read_fast():
        path.write_bytes(whole[:300])
        with pytest.raises(ValueError):
            gguf.GGUFReader(path)
        path.write_bytes(whole)
        assert gguf.GGUFReader(path).fields["some.number"].contents() == 7


def test_a_model_in_a_cut_file_is_refused(path):
    whole = path.read_bytes()
    end = _reader()(path).tensors[0].data_offset
    for size in range(8, end - 32, end // 6):
        path.write_bytes(whole[:size])
        with pytest.raises(BadValue, match="cannot be loaded"):
            load_model(TrainConfig(model=str(path)))


@pytest.mark.parametrize("error", [OverflowError, TypeError, RuntimeError, IndexError])
def test_whatever_a_damaged_file_makes_of_its_readers_is_told(path, error, monkeypatch):
    def fails(*args, **kwargs):
        raise error("deep inside")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(BadValue, match="cannot be loaded: deep inside"):
        load_model(TrainConfig(model=str(path)))
