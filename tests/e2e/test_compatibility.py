"""Every client of every surface against one running server with the pocket model; makes docs/compatibility.md.

python -m pytest tests/e2e/test_compatibility.py            runs all of it
python -m tests.e2e.test_compatibility                      writes the table
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.e2e.compatibility import CASES, Case, case, table, without_versions, write, written
from tests.e2e.running import Served, serve
from tests.e2e.test_image_clients import IMAGES

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "models" / "pocket"
PROMPT = "Once upon a time, there was a young cat called Mia."
CHAT: Any = [{"role": "user", "content": "What is Inflight?"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": SCHEMA}}]
TGI, OPENAI, MINDSPORE, OIP = "Text Generation Inference", "OpenAI", "MindSpore Serving", "Open Inference Protocol"

TEXT, HUB, LANG, OPEN, TRITON = "text-generation", "huggingface_hub", "langchain-huggingface", "openai", "tritonclient"
OURS = "mindspore_serving (ours)"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("all")
    digits = str(ROOT / "examples" / "tensor_add" / "tensor_add")
    with serve(root, str(POCKET), digits, "--kv-cache-memory", "32m", "--max-total-tokens", "900") as one:
        yield one


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20", "ignore::UserWarning")
@pytest.mark.parametrize("one", CASES, ids=lambda one: one.id)
def test_call(one: Case, served: Served) -> None:
    one.check(served)


def test_the_page_says_what_is_tried() -> None:
    """Run `python -m tests.e2e.test_compatibility` where this fails."""
    assert without_versions(written()) == without_versions(table())
    assert f"### {IMAGES}" in written()


# text-generation


def text_client(served: Served) -> Any:
    from text_generation import Client

    return Client(f"http://{served.http}", timeout=60)


@case(TGI, TEXT, "`Client.generate`, with details, top tokens, prefill")
def text_generate(served: Served) -> None:
    answer = text_client(served).generate(PROMPT, max_new_tokens=12, decoder_input_details=True, top_n_tokens=2)
    assert answer.details.generated_tokens == 12
    assert answer.details.prefill[0].logprob is None
    assert len(answer.details.top_tokens) == 12


@case(TGI, TEXT, "`Client.generate` with sampling, stop, truncate, best_of, watermark, return_full_text")
def text_generate_options(served: Served) -> None:
    client = text_client(served)
    answer = client.generate(PROMPT, do_sample=True, seed=3, temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=12)
    assert answer.details.seed == 3
    assert client.generate(PROMPT, max_new_tokens=80, stop_sequences=["."]).generated_text.endswith(".")
    best = client.generate(PROMPT, do_sample=True, best_of=2, max_new_tokens=5)
    assert len(best.details.best_of_sequences) == 1
    assert client.generate(PROMPT, watermark=True, truncate=4, max_new_tokens=3).details.generated_tokens == 3
    assert client.generate(PROMPT, return_full_text=True, max_new_tokens=3).generated_text.startswith(PROMPT)


@case(TGI, TEXT, "`Client.generate` with a grammar")
def text_grammar(served: Served) -> None:
    from text_generation.types import Grammar, GrammarType

    grammar = Grammar(type=GrammarType.Json, value=SCHEMA)
    answer = text_client(served).generate(PROMPT, max_new_tokens=200, seed=1, do_sample=True, grammar=grammar)
    jsonschema.validate(json.loads(answer.generated_text), SCHEMA)


@case(TGI, TEXT, "`Client.generate_stream`")
def text_stream(served: Served) -> None:
    frames = list(text_client(served).generate_stream(PROMPT, max_new_tokens=12))
    assert frames[-1].generated_text == "".join(frame.token.text for frame in frames)


@case(TGI, TEXT, "`Client.chat`, plain and with tools")
def text_chat(served: Served) -> None:
    client = text_client(served)
    answer = client.chat(messages=CHAT, max_tokens=60, temperature=0.01)
    assert "Inflight" in answer.choices[0].message.content
    tools = client.chat(messages=CHAT, max_tokens=200, tools=TOOLS, tool_choice="weather", seed=3)
    (call,) = tools.choices[0].message.tool_calls
    assert call["function"]["name"] == "weather"


@case(
    TGI, TEXT, "`Client.chat(stream=True)`", "fails in the client: the wheel of 0.7.0 cannot read TGI 3's chunks either"
)
def text_chat_stream(served: Served) -> None:
    import pydantic

    # It fails once more while it tells so.
    with pytest.raises((pydantic.ValidationError, AttributeError)):
        list(text_client(served).chat(messages=CHAT, max_tokens=20, stream=True))


@case(TGI, TEXT, "`AsyncClient.generate`, `generate_stream`")
def text_async(served: Served) -> None:
    from text_generation import AsyncClient

    async def main() -> None:
        client = AsyncClient(f"http://{served.http}", timeout=60)
        answer = await client.generate(PROMPT, max_new_tokens=6)
        frames = [frame async for frame in client.generate_stream(PROMPT, max_new_tokens=6)]
        assert frames[-1].generated_text == answer.generated_text

    asyncio.run(main())


@case(TGI, TEXT, "errors: `ValidationError`")
def text_errors(served: Served) -> None:
    from text_generation.errors import ValidationError

    with pytest.raises(ValidationError):
        text_client(served).generate("story " * 900)


# huggingface_hub


def hub(served: Served) -> Any:
    from huggingface_hub import InferenceClient

    return InferenceClient(f"http://{served.http}", timeout=60)


@case(TGI, HUB, "`text_generation`, plain, details, stream, both")
def hub_text(served: Served) -> None:
    client = hub(served)
    text = client.text_generation(PROMPT, max_new_tokens=12, return_full_text=False)
    whole = client.text_generation(PROMPT, max_new_tokens=12, details=True, return_full_text=False)
    assert whole.generated_text == text == "".join(client.text_generation(PROMPT, max_new_tokens=12, stream=True))
    *_, last = client.text_generation(PROMPT, max_new_tokens=12, stream=True, details=True)
    assert last.details.generated_tokens == 12


@case(TGI, HUB, "`text_generation` with a grammar: JSON schema, regex")
def hub_grammar(served: Served) -> None:
    client = hub(served)
    options: Any = {"max_new_tokens": 200, "seed": 3, "do_sample": True, "return_full_text": False}
    found = client.text_generation(PROMPT, grammar={"type": "json", "value": SCHEMA}, **options)
    jsonschema.validate(json.loads(found), SCHEMA)
    assert client.text_generation(PROMPT, grammar={"type": "regex", "value": "(yes|no)"}, **options) in ("yes", "no")


@case(TGI, HUB, "`chat_completion`, plain and streamed, with log-probabilities, seed, stop")
def hub_chat(served: Served) -> None:
    client = hub(served)
    answer = client.chat_completion(CHAT, max_tokens=60, temperature=0, logprobs=True, top_logprobs=2)
    whole = answer.choices[0].message.content
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    parts = client.chat_completion(
        CHAT, max_tokens=60, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole
    cut = client.chat_completion(CHAT, max_tokens=60, temperature=0, stop=[" "]).choices[0].message.content
    assert cut == whole.split(" ")[0]
    one, other = (client.chat_completion(CHAT, max_tokens=20, seed=5).choices[0].message.content for _ in "ab")
    assert one == other


@case(TGI, HUB, "`chat_completion` with tools: auto, required, named; streamed")
def hub_tools(served: Served) -> None:
    client = hub(served)
    for choice in ("required", {"function": {"name": "weather"}}):
        answer = client.chat_completion(CHAT, tools=TOOLS, tool_choice=choice, max_tokens=200, seed=3)
        (call, *_) = answer.choices[0].message.tool_calls
        arguments = call.function.arguments
        jsonschema.validate(json.loads(arguments) if isinstance(arguments, str) else arguments, SCHEMA)
    stream = client.chat_completion(CHAT, tools=TOOLS, tool_choice="required", max_tokens=200, seed=3, stream=True)
    assert any(part.choices[0].delta.tool_calls for part in stream if part.choices)
    auto = client.chat_completion(CHAT, tools=TOOLS, tool_choice="auto", max_tokens=60, temperature=0)
    assert auto.choices[0].message.content or auto.choices[0].message.tool_calls


@case(TGI, HUB, "`chat_completion` with response_format")
def hub_format(served: Served) -> None:
    client = hub(served)
    for given in (
        {"type": "json_schema", "json_schema": {"name": "visit", "schema": SCHEMA}},
        {"type": "json_object", "value": SCHEMA},
    ):
        answer = client.chat_completion(CHAT, max_tokens=200, seed=3, response_format=given)
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


@case(TGI, HUB, "`AsyncInferenceClient.text_generation`, `chat_completion`, streamed")
def hub_async(served: Served) -> None:
    from huggingface_hub import AsyncInferenceClient

    async def main() -> None:
        async with AsyncInferenceClient(f"http://{served.http}", timeout=60) as client:
            stream = await client.text_generation(PROMPT, max_new_tokens=6, stream=True)
            assert "".join([part async for part in stream])
            chat = await client.chat_completion(CHAT, max_tokens=20, stream=True, temperature=0)
            assert "".join([part.choices[0].delta.content or "" async for part in chat if part.choices])

    asyncio.run(main())


@case(TGI, HUB, "errors: `ValidationError` of text generation, HTTP errors of chat")
def hub_errors(served: Served) -> None:
    from huggingface_hub.errors import HfHubHTTPError, ValidationError

    with pytest.raises((ValidationError, HfHubHTTPError), match="top_p"):
        hub(served).text_generation(PROMPT, top_p=2.0)
    with pytest.raises(HfHubHTTPError):
        hub(served).chat_completion(CHAT, top_p=2.0)


# langchain


def endpoint(served: Served, **more: Any) -> Any:
    from langchain_huggingface import HuggingFaceEndpoint

    return HuggingFaceEndpoint(endpoint_url=f"http://{served.http}", max_new_tokens=20, **more)


@case(TGI, LANG, "`HuggingFaceEndpoint.invoke`, `stream`, stop")
def lang_endpoint(served: Served) -> None:
    model = endpoint(served)
    assert model.invoke(PROMPT)
    assert "".join(model.stream(PROMPT))
    assert "." not in endpoint(served, do_sample=False).invoke(PROMPT, stop=["."]).rstrip(".")


@case(TGI, LANG, "`ChatHuggingFace.invoke`, `stream`, `bind_tools`")
def lang_chat(served: Served) -> None:
    from langchain_huggingface import ChatHuggingFace

    chat = ChatHuggingFace(llm=endpoint(served), model_id="pocket", max_tokens=200)
    assert chat.invoke("What is Inflight?").content
    assert "".join(str(part.content) for part in chat.stream("What is Inflight?"))
    bound = chat.bind_tools(TOOLS, tool_choice="weather")
    (call,) = bound.invoke("What is Inflight?").tool_calls
    assert call["name"] == "weather"
    jsonschema.validate(call["args"], SCHEMA)


# curl


def curl(*arguments: str) -> str:
    done = subprocess.run(["curl", "-sS", "-N", "--max-time", "60", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl_json(url: str, body: Any) -> str:
    return curl(url, "-H", "Content-Type: application/json", "-d", json.dumps(body))


@case(TGI, "curl", "`/generate`, `/generate_stream`, `/`, `/vertex`, `/invocations`, `/tokenize`, `/info`, `/metrics`")
def curl_tgi(served: Served) -> None:
    url = f"http://{served.http}"
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 5}}
    text = json.loads(curl_json(f"{url}/generate", body))["generated_text"]
    frames = [json.loads(line[5:]) for line in curl_json(f"{url}/generate_stream", body).splitlines() if line]
    assert frames[-1]["generated_text"] == text
    assert json.loads(curl_json(url, body))[0]["generated_text"] == PROMPT + text
    assert len(json.loads(curl_json(f"{url}/vertex", {"instances": [body]}))["predictions"]) == 1
    assert json.loads(curl_json(f"{url}/invocations", body))[0]["generated_text"] == PROMPT + text
    assert json.loads(curl_json(f"{url}/tokenize", {"inputs": PROMPT}))
    assert json.loads(curl(f"{url}/info"))["max_total_tokens"] == 900
    assert "tgi_request_success" in curl(f"{url}/metrics")


# openai


@contextlib.contextmanager
def openai_client(served: Served) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"http://{served.http}/v1", api_key="-", max_retries=0, timeout=60) as client:
        yield client


@case(OPENAI, OPEN, "`chat.completions.create`, plain and streamed, n, logprobs, usage, seed, penalties, stop")
def openai_chat(served: Served) -> None:
    with openai_client(served) as client:
        options: Any = {"model": "pocket", "messages": CHAT, "temperature": 0, "max_completion_tokens": 60}
        answer = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        assert answer.choices[0].finish_reason == "stop"
        stream = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
        text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
        assert text == answer.choices[0].message.content
        assert stream[-1].usage.completion_tokens == answer.usage.completion_tokens
        more = client.chat.completions.create(
            model="gpt-4o", messages=CHAT, n=2, seed=1, presence_penalty=0.5, frequency_penalty=0.5, stop="x",
            logit_bias={"5": -100}, max_tokens=9,
        )  # fmt: skip
        assert len(more.choices) == 2


@case(OPENAI, OPEN, "`chat.completions.create` with tools: auto, none, required, named, parallel; streamed")
def openai_tools(served: Served) -> None:
    with openai_client(served) as client:
        options: Any = {"model": "pocket", "messages": CHAT, "tools": TOOLS, "max_tokens": 300, "seed": 3}
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            answer = client.chat.completions.create(**options, tool_choice=choice)
            assert answer.choices[0].finish_reason == "tool_calls"
            jsonschema.validate(json.loads(answer.choices[0].message.tool_calls[0].function.arguments), SCHEMA)
        stream = list(client.chat.completions.create(**options, tool_choice="required", stream=True))
        assert stream[-1].choices[0].finish_reason == "tool_calls"
        none = client.chat.completions.create(**options, tool_choice="none", parallel_tool_calls=False)
        assert none.choices[0].message.tool_calls is None


@case(OPENAI, OPEN, "`chat.completions.parse`, response_format json_schema, json_object, text")
def openai_format(served: Served) -> None:
    with openai_client(served) as client:
        given: Any = {"type": "json_schema", "json_schema": {"name": "visit", "schema": SCHEMA, "strict": True}}
        answer = client.chat.completions.create(
            model="pocket", messages=CHAT, response_format=given, max_tokens=200, seed=3
        )
        jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


@case(OPENAI, OPEN, "`completions.create`: lists, echo, logprobs, best_of, suffix refused; streamed")
def openai_completions(served: Served) -> None:
    import openai

    with openai_client(served) as client:
        answer = client.completions.create(
            model="pocket", prompt=["Once", "One day"], max_tokens=5, echo=True, logprobs=1, temperature=0
        )
        assert answer.choices[0].text.startswith("Once")
        assert client.completions.create(model="pocket", prompt="Once", max_tokens=5, best_of=2, n=2).choices
        assert list(client.completions.create(model="pocket", prompt="Once", max_tokens=5, stream=True))
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="pocket", prompt="Once", suffix="x")


@case(OPENAI, OPEN, "`responses.create`: text, instructions, tools, json_schema; streamed")
def openai_responses(served: Served) -> None:
    with openai_client(served) as client:
        answer = client.responses.create(
            model="pocket", input="What is Inflight?", instructions="Be brief.", temperature=0, max_output_tokens=80
        )
        assert answer.status == "completed"
        assert "Inflight" in answer.output_text
        events = list(
            client.responses.create(
                model="pocket", input=CHAT, instructions="Be brief.", temperature=0, max_output_tokens=80, stream=True
            )
        )
        assert "".join(one.delta for one in events if one.type == "response.output_text.delta") == answer.output_text
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == answer.output_text
        form: Any = {"format": {"type": "json_schema", "name": "visit", "schema": SCHEMA, "strict": True}}
        bound = client.responses.create(model="pocket", input="Where?", text=form, max_output_tokens=200)
        jsonschema.validate(json.loads(bound.output_text), SCHEMA)
        tool: Any = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}
        called = client.responses.create(model="pocket", input="Where?", tools=[tool], tool_choice="required")
        (call, *_) = [one for one in called.output if one.type == "function_call"]
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
        more: Any = [
            *CHAT,
            call.model_dump(),
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
        ]
        cut = client.responses.create(model="pocket", input=more, max_output_tokens=5, temperature=0)
        assert cut.status == "incomplete"


@case(OPENAI, OPEN, "`embeddings.create`")
def openai_embeddings(served: Served) -> None:
    with openai_client(served) as client:
        found = client.embeddings.create(model="pocket", input=["Once", "upon"], dimensions=8)
        assert [len(one.embedding) for one in found.data] == [8, 8]


@case(OPENAI, OPEN, "`models.list`, `models.retrieve`")
def openai_models(served: Served) -> None:
    with openai_client(served) as client:
        assert [one.id for one in client.models.list()] == ["pocket"]
        assert client.models.retrieve("pocket").id == "pocket"


@case(OPENAI, OPEN, "`AsyncOpenAI`: many streams at once")
def openai_async(served: Served) -> None:
    import openai

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"http://{served.http}/v1", api_key="-", max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(
                    model="pocket", prompt=f"{number}. Once", max_tokens=12, stream=True, temperature=0
                )
                return "".join([part.choices[0].text async for part in stream])

            assert all(await asyncio.gather(*(one(number) for number in range(12))))

    asyncio.run(main())


@case(OPENAI, OPEN, "errors: status and type of every kind")
def openai_errors(served: Served) -> None:
    import openai

    with openai_client(served) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="pocket", messages=CHAT, temperature=-1)
        assert caught.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="pocket", messages=[])
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")
        with pytest.raises(openai.NotFoundError):
            client.images.generate(model="pocket", prompt="a cat")


# MindSpore Serving


@case(MINDSPORE, OURS, "`Client.infer` over gRPC: a classic servable, a language model")
def mindspore_grpc(served: Served) -> None:
    from mindspore_serving.client import Client

    client = Client(served.grpc, "tensor_add", "add_common")
    ones = np.ones((2, 2), np.float32)
    assert (client.infer({"x1": ones, "x2": ones})[0]["y"] == 2).all()
    model = Client(served.grpc, "pocket", "generate")
    assert model.infer({"inputs": "Once", "parameters": '{"max_new_tokens": 3}'})[0]["generated_tokens"] == 3


@case(MINDSPORE, OURS, "`MindsporeInferenceClient.generate`, `generate_stream` (2.1)")
def mindspore_llm(served: Served) -> None:
    from mindspore_serving.client import MindsporeInferenceClient

    client = MindsporeInferenceClient("llama2", f"http://{served.http}")
    answer = client.generate(PROMPT, do_sample=False, max_new_tokens=6)
    *_, last = client.generate_stream(PROMPT, do_sample=False, max_new_tokens=6)
    assert last.generated_text == answer.generated_text


@case(MINDSPORE, "curl", "`/model/…:method`, `:generate`, `:generated_stream`, `/models/…`, `/serving/…`")
def curl_mindspore(served: Served) -> None:
    url = f"http://{served.http}"
    ones = [[1.0, 1.0], [1.0, 1.0]]
    added = json.loads(curl_json(f"{url}/model/tensor_add:add_common", {"instances": [{"x1": ones, "x2": ones}]}))
    assert added["instances"][0]["y"] == [[2, 2], [2, 2]]
    body = {"instances": [{"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}]}
    text = json.loads(curl_json(f"{url}/model/pocket:generate", body))["instances"][0]["generated_text"]
    assert json.dumps(text)[1:-1] in curl_json(f"{url}/model/pocket:generated_stream", body)
    assert "data:" in curl_json(
        f"{url}/models/llama2/generate_stream", {"inputs": "Once", "parameters": {"max_new_tokens": 2}}
    )
    assert "data" in curl(f"{url}/serving/get_bs")


# Open Inference Protocol


def triton_tensors(module: Any) -> list[Any]:
    tensor = module.InferInput("inputs", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([PROMPT.encode()], np.object_))
    parameters = module.InferInput("parameters", [1], "BYTES")
    parameters.set_data_from_numpy(np.array([b'{"max_new_tokens": 5}'], np.object_))
    return [tensor, parameters]


@case(OIP, TRITON, "HTTP `infer`, `is_model_ready`, `get_model_metadata`")
def triton_http(served: Served) -> None:
    import tritonclient.http as triton

    with contextlib.closing(triton.InferenceServerClient(served.http)) as client:
        assert client.is_model_ready("pocket")
        assert client.get_model_metadata("pocket")["name"] == "pocket"
        assert client.infer("pocket", triton_tensors(triton)).as_numpy("generated_tokens")[0] == 5


@case(OIP, TRITON, "gRPC `infer`, `start_stream` with `stream` true")
def triton_grpc(served: Served) -> None:
    import tritonclient.grpc as triton

    with contextlib.closing(triton.InferenceServerClient(served.grpc)) as client:
        text = client.infer("pocket", triton_tensors(triton)).as_numpy("generated_text")[0].decode()
        results: queue.Queue[Any] = queue.Queue()
        client.start_stream(callback=lambda result, error: results.put(error or result))
        client.async_stream_infer("pocket", triton_tensors(triton), parameters={"stream": True})
        streamed = ""
        while not (result := results.get(timeout=30)).get_response().parameters["triton_final_response"].bool_param:
            streamed += result.as_numpy("text_output")[0].decode()
        client.stop_stream()
        assert streamed == text


@case(OIP, "curl", "`/v2/models/…/generate`, `/generate_stream`, `/infer`, `/v2/health/ready`")
def curl_oip(served: Served) -> None:
    url = f"http://{served.http}/v2"
    body = {"text_input": PROMPT, "parameters": {"max_tokens": 5}}
    text = json.loads(curl_json(f"{url}/models/pocket/generate", body))["text_output"]
    lines = [
        json.loads(line[5:]) for line in curl_json(f"{url}/models/pocket/generate_stream", body).splitlines() if line
    ]
    assert "".join(line["text_output"] for line in lines) == text
    assert json.loads(curl(f"{url}/health/ready"))["ready"]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write()
