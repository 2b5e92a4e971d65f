"""What the TPU's own compiler makes of the linear losses, on a machine without a TPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("libtpu", reason="the extra [tpu] is not installed")

GIB = 2**30
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
sys.path.insert(0, sys.argv[1])
from test_memory import compiled, vocabulary_sizes
from raft_jax.losses import linear_top_k

chip = SingleDeviceSharding(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0])
if sys.argv[2] == "search":
    hidden, head = (jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=chip) for size in [(1, 64, 128), (128, 128256)])
    search = lambda recall: jax.jit(lambda h, w: linear_top_k(h, w, recall=recall, vocab_shards=1))
    text = {recall: search(recall).lower(hidden, head).compile().as_text() for recall in (None, 0.95)}
    print(json.dumps({str(recall): "PartialReduce" in program for recall, program in text.items()}))
else:
    tied, at_once = sys.argv[2] != "untied", sys.argv[2] == "at once"
    program = compiled(int(sys.argv[3]), tied=tied, at_once=at_once, sharding=chip, vocab_shards=1)
    print(json.dumps({"sizes": sorted(vocabulary_sizes(program.as_text()))}))
"""


def run(*arguments, dump=None):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": f"--xla_dump_to={dump} --xla_dump_hlo_as_text" if dump else "",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    print(*arguments, done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def temporary_bytes(dump):
    """Of the chip's own memory, by the buffer assignment; `memory_analysis` of jaxlib 0.12 reports up to half more."""
    (assignment,) = dump.glob("*jit_loss*buffer-assignment.txt")
    sizes = re.findall(r"size (\d+)(?:, page \d+)?, preallocated-temp", assignment.read_text())  # no other "color"
    assert sizes
    return sum(map(int, sizes))


@pytest.mark.parametrize("head", ["untied", "tied", "at once"])
def test_temporary_memory_on_a_v5e_chip(head, tmp_path):
    """8,192 tokens, width 4,096, vocabulary 128,256, K = 512: at most 3 GiB, at once 1; of twice nothing as wide."""
    once, twice = run(head, 1024, dump=tmp_path), run(head, 2048)
    temporary = temporary_bytes(tmp_path)
    print(head, temporary)
    assert temporary <= (1 if head == "at once" else 3) * GIB
    assert set(twice["sizes"]) <= set(once["sizes"])


def test_recall_is_a_partial_reduction():
    assert run("search") == {"None": False, "0.95": True}
