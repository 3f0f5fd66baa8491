#!/usr/bin/env bash
# Asks a running server one question about a picture and checks that adaptive attention acted.
#   deploy/smoke.sh http://localhost:8000 [API_KEY]
# Exit status: 0 where all checks passed. Behind a router, METRICS_URL names one server:
# a router's /metrics are its own. Needs curl and python3.
set -uo pipefail

if [ $# -lt 1 ] || [ $# -gt 2 ]; then
  sed -n '2,5s/^# //p' "$0" >&2
  exit 2
fi
url=${1%/}
metrics_url=${METRICS_URL:-$url}
header="Authorization: Bearer ${2:-none}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=0

pass() { echo "PASS  $1"; }
fail() {
  echo "FAIL  $1"
  failed=1
}
finish() {
  [ "$failed" = 0 ] && echo "all passed" || echo "some checks failed"
  exit "$failed"
}
# Prints the status; the body goes to $scratch/body.
fetch() {
  curl -sS --max-time "${TIMEOUT:-300}" -H "$header" -o "$scratch/body" -w '%{http_code}' "$@" \
    2>"$scratch/error" || cat "$scratch/error"
}
# Prints a counter, summed over its labels; nothing where there is none.
counter() {
  curl -sS --max-time 20 "${metrics_url%/}/metrics" 2>/dev/null |
    awk -v name="$1" '$1 ~ "^" name "({|$)" { sum += $2; found = 1 } END { if (found) print sum }'
}
read_json() { python3 -c "import json, sys; answer = json.load(open(sys.argv[1])); print($1)" "$scratch/body" 2>/dev/null; }

status=$(fetch "$url/health")
if [ "$status" != 200 ]; then
  fail "/health: $status"
  finish
fi
pass "/health"

status=$(fetch "$url/v1/models")
model=$(read_json 'answer["data"][0]["id"]')
if [ "$status" != 200 ] || [ -z "$model" ]; then
  fail "/v1/models: $status $(head -c 300 "$scratch/body")"
  finish
fi
pass "/v1/models: $model"

freed_before=$(counter vllm_avl_blocks_freed_early_total)
if [ -n "$freed_before" ]; then
  pass "/metrics has vllm_avl_ names"
else
  fail "/metrics has no vllm_avl_blocks_freed_early_total: is it served with --attention-backend avl?"
fi

# A picture of 672 x 672 pixels: coloured stripes, and a seed so that no cache knows it.
python3 - "$model" >"$scratch/request" <<'PYTHON'
import base64, json, random, struct, sys, zlib

side, seed = 672, random.randrange(256)
rows = b"".join(
    b"\0" + bytes(c for x in range(side) for c in ((x * y // 64) % 256, (x + seed) % 256, y % 256))
    for y in range(side)
)
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
picture = {"url": "data:image/png;base64," + base64.b64encode(png).decode()}
content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "What is in the picture?"}]
print(json.dumps({
    "model": sys.argv[1], "messages": [{"role": "user", "content": content}],
    "max_tokens": 16, "temperature": 0, "ignore_eos": True,
}))
PYTHON
status=$(fetch "$url/v1/chat/completions" -H 'Content-Type: application/json' --data-binary "@$scratch/request")
tokens=$(read_json 'answer["usage"]["prompt_tokens"] * bool(answer["choices"])')
if [ "$status" = 200 ] && [ "${tokens:-0}" -gt 0 ]; then
  pass "a chat completion with a picture: $tokens prompt tokens"
else
  fail "a chat completion with a picture: $status $(head -c 300 "$scratch/body")"
fi

if [ -n "$freed_before" ]; then
  for _ in 1 2 3 4 5 6 7 8 9 10; do
    freed=$(counter vllm_avl_blocks_freed_early_total)
    [ "${freed:-$freed_before}" != "$freed_before" ] && break
    sleep 0.5
  done
  if [ "${freed:-$freed_before}" != "$freed_before" ]; then
    pass "KV blocks were freed early: $freed_before before, $freed after"
  else
    fail "no KV block was freed early; vllm_avl_requests_left_alone_total says why, by reason"
  fi
fi
finish
