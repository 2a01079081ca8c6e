"""What the tests of the command-line tools share."""

import pytest
import torch


@pytest.fixture
def checkpoint_pair(tmp_path, make_llama):
    """checkpoint_pair(change, **config): a tiny Llama in tmp_path/base, and in tmp_path/tuned with every change(name,
    parameter, generator).
    """

    def save(change, model=None, *, dtype=torch.float32, max_shard_size="5GB", **config) -> tuple[str, str]:
        model = model or make_llama(dtype=dtype, **config)
        model.save_pretrained(tmp_path / "base", max_shard_size=max_shard_size)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            delta = change(name, parameter, generator)
            if delta is not None:
                parameter.data = (parameter.data.float() + delta).to(dtype)
        model.save_pretrained(tmp_path / "tuned", max_shard_size=max_shard_size)
        return str(tmp_path / "base"), str(tmp_path / "tuned")

    return save
