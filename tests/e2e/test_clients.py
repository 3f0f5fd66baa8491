"""Clients that add usage up: nothing warns, and the sums are sums."""

import warnings

import pytest
from kept_content import KEY, part, picture, post

TEXT = {"type": "text", "text": "What is it?"}
SEEDS = (1, 2)


@pytest.fixture
def server(content_server):
    return content_server


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    monkeypatch.setenv("LANGSMITH_TRACING", "false")


def chat(seed):
    return [{"role": "user", "content": [part(picture(seed)), TEXT]}]


@pytest.fixture
def alone(server):
    """What the server itself says of each question, and of a text."""
    asked = [[part(picture(seed)), TEXT] for seed in SEEDS] + [[TEXT]]
    return [post(server, content).json()["usage"] for content in asked]


def added(usages):
    return {name: sum(one["avl"][name] for one in usages) for name in usages[0]["avl"]}


def langchain(server, **options):
    openai = pytest.importorskip("langchain_openai", reason="a client that is tested")
    return openai.ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key=KEY,
        model=server.model,
        max_tokens=24,
        temperature=0,
        max_retries=0,
        extra_body={"ignore_eos": True},
        **options,
    )


def test_langchain_adds_up(server, alone):
    model = langchain(server)
    from langchain_core.messages import convert_to_messages

    texts = [[{"role": "user", "content": [TEXT]}]]
    chats = [convert_to_messages(one) for one in [*map(chat, SEEDS), *texts]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = model.generate(chats).llm_output["token_usage"]
    assert said["avl"] == added(alone)
    assert said["prompt_tokens"] == sum(one["prompt_tokens"] for one in alone)


def test_langchain_adds_up_what_is_streamed(server, alone):
    model = langchain(server, stream_usage=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunks = list(model.stream(chat(SEEDS[0])))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["input_tokens"] == alone[0]["prompt_tokens"]
    assert whole.usage_metadata["output_tokens"] == 24


def litellm_completion(server, **options):
    litellm = pytest.importorskip("litellm", reason="a client that is tested")
    return litellm, litellm.completion(
        model=f"hosted_vllm/{server.model}",
        api_base=f"{server.url}/v1",
        api_key=KEY,
        messages=chat(SEEDS[0]),
        max_tokens=24,
        temperature=0,
        extra_body={"ignore_eos": True},
        **options,
    )


def test_litellm_passes_the_counts_on(server, alone):
    _, answer = litellm_completion(server)
    assert dict(answer.usage.model_dump()["avl"]) == alone[0]["avl"]
    assert answer.usage.prompt_tokens == alone[0]["prompt_tokens"]


def test_litellm_reads_a_stream_to_its_end(server, alone):
    litellm, stream = litellm_completion(
        server, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    whole = litellm.stream_chunk_builder(chunks, messages=chat(SEEDS[0]))
    assert whole.usage.prompt_tokens == alone[0]["prompt_tokens"]
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].message.content


def test_openai_adds_up(server, alone):
    client = server.client()
    answers = [
        client.chat.completions.create(
            model=server.model,
            messages=chat(seed),
            max_tokens=24,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        for seed in SEEDS
    ]
    assert added([one.usage.model_dump() for one in answers]) == added(alone[:2])
    assert [one.model_dump()["avl"][0]["policy"] for one in answers] == ["avl", "avl"]
