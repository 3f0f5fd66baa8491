"""What a worker tells of a request, asked as the README says, across processes."""

import ast
import sys

import preloaded

SCRIPT = """
from vllm import LLM, SamplingParams
from benchmarks.testing import models

def main():
    llm = LLM(
        {checkpoint!r},
        attention_backend="avl",
        additional_config={{"avl": {{"introspection": 1}}}},
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        kv_cache_memory_bytes=32 << 20,
    )
    prompt = {{
        "prompt": models.image_prompt("llava", 1, "What?"),
        "multi_modal_data": {{"image": models.random_image(1)}},
    }}
    llm.generate(prompt, SamplingParams(max_tokens=3, ignore_eos=True))
    (ids,) = llm.collective_rpc("avl_requests")
    print("RESULT", llm.collective_rpc("avl_report", args=(ids[-1],)))

if __name__ == "__main__":
    main()
"""


def test_an_engine_in_its_own_process_reports_a_dict(checkpoints, tmp_path):
    script = tmp_path / "report.py"
    script.write_text(SCRIPT.format(checkpoint=str(checkpoints("llava"))))
    in_its_own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = preloaded.run([sys.executable, script], 300, in_its_own)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    (report,) = ast.literal_eval(line.removeprefix("RESULT "))
    assert report["policy"] == "avl"
    assert report["num_blocks_freed"] > 0
    layer = report["layers"][0]
    held = [len(layer[name][0]) for name in ("core", "secondary", "evicted", "text")]
    assert sum(held) == report["num_tokens"]
