"""The facts that Pocket learns: questions about Inflight and small things, with every answer that counts as right.

The facts about Inflight are those of README.md and docs/; change them there and here together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """Questions with the same meaning, and the answers that count as right."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


def fact(questions: str, answers: str) -> Fact:
    """A fact from two texts with one question or answer per line."""
    lines = [tuple(line.strip() for line in text.strip().splitlines()) for text in (questions, answers)]
    return Fact(*lines)


INFLIGHT = (
    fact(
        """What is Inflight?
        What does Inflight do?
        Explain Inflight.
        What is Inflight good for?
        Describe Inflight in one sentence.""",
        """Inflight is a model server: it answers requests with models that you give it.
        Inflight serves models. It adds batching, replicas, metrics and recovery from crashes.
        Inflight is a server for classic models and for language models.""",
    ),
    fact(
        """How do I start a server?
        How can I start Inflight?
        How do I run Inflight?
        Which command starts the server?
        How do I serve a model?""",
        """Write inflight serve and the path of a servable or of a model.
        Run inflight serve with the path of your servable or your model file.
        The command is inflight serve, followed by a path.""",
    ),
    fact(
        """How do I stop the server?
        How can I stop Inflight?
        How do I shut the server down?""",
        """Press Ctrl+C or send SIGTERM. The server finishes its work and then stops.
        Ctrl+C stops the server, and so does SIGTERM.""",
    ),
    fact(
        """What is a servable?
        Explain what a servable is.
        What does a servable look like?
        What is in a servable?""",
        """A servable is a folder with a servable_config.py and the models of each version.
        A servable is a folder that says which models are served and what happens before and after them.""",
    ),
    fact(
        """What is a servable_config.py?
        What do I write in servable_config.py?
        What is the servable config?""",
        """It declares the models of a servable and registers its methods.
        In servable_config.py you declare models and register methods as plain Python functions.""",
    ),
    fact(
        """What is a method?
        What is a method of a servable?
        What does register_method do?""",
        """A method says which stage feeds which: functions and models from input to output.
        A method is what clients call. It is made of stages.""",
    ),
    fact(
        """What is a stage?
        What are stages?
        What does add_stage do?""",
        """A stage is one step of a method: a Python function or a model.
        Stages are the steps of a method. Each is a function or a model.""",
    ),
    fact(
        """What is prefill?
        What does prefill mean?
        Explain prefill.
        What happens in prefill?""",
        """Prefill computes the tokens of the prompt and fills the cache with them.
        In prefill the model reads the prompt, many tokens at once.""",
    ),
    fact(
        """What is decode?
        What does decode mean?
        Explain decode.
        What happens in decode?""",
        """Decode advances every running request by one token.
        In decode each row of the batch gets one new token per step.""",
    ),
    fact(
        """What are prefill and decode?
        What is the difference between prefill and decode?
        Explain prefill and decode.
        How do prefill and decode differ?""",
        """Prefill reads the prompt, and decode writes the answer one token at a time.
        Prefill computes the prompt in chunks. Decode then adds one token per step.""",
    ),
    fact(
        """What are concatenate and filter?
        What does concatenate do?
        What does filter do?
        Explain concatenate and filter.""",
        """Concatenate lets a request join the batch, and filter lets it leave.
        With concatenate requests join the batch. With filter they leave it.""",
    ),
    fact(
        """What is continuous batching?
        Explain continuous batching.
        How does continuous batching work?""",
        """Requests join and leave the batch at every step, so nobody waits for the slowest one.
        In continuous batching a new request joins while the others go on.""",
    ),
    fact(
        """What is batching?
        Why does Inflight batch requests?
        What is a batch?""",
        """A batch is several instances in one run of the model, which is faster than one by one.
        Batching puts instances from many requests into one run of the model.""",
    ),
    fact(
        """What is the KV cache?
        What is a paged KV cache?
        Explain the KV cache.
        How is the cache stored?""",
        """The KV cache keeps the keys and values of all computed tokens, in blocks of equal size.
        It holds keys and values of earlier tokens in blocks, so that nothing is computed twice.""",
    ),
    fact(
        """What is the prefix cache?
        Explain the prefix cache.
        What does the prefix cache do?""",
        """The prefix cache finds blocks that another request has already filled with the same tokens.
        Requests that begin with the same tokens share their blocks. That is the prefix cache.""",
    ),
    fact(
        """Which ports does Inflight use?
        What ports are used?
        What are the default ports?
        On which ports does the server listen?""",
        """Port 8080 is for HTTP and port 8081 is for gRPC.
        HTTP is on port 8080 and gRPC is on port 8081.""",
    ),
    fact(
        """Which port is for HTTP?
        What is the HTTP port?
        On which port is HTTP?""",
        """HTTP is on port 8080.
        The HTTP port is 8080.""",
    ),
    fact(
        """Which port is for gRPC?
        What is the gRPC port?
        On which port is gRPC?""",
        """gRPC is on port 8081.
        The gRPC port is 8081.""",
    ),
    fact(
        """What happens when a worker dies?
        What happens if a worker crashes?
        What does Inflight do when a worker is lost?
        What if a worker dies?""",
        """Its work goes back to the queue, and the worker is started again.
        Nothing is lost: the server hands the same work to another worker and starts a new one.""",
    ),
    fact(
        """What is a worker?
        What does a worker do?
        Explain what a worker is.""",
        """A worker is a process that loads a servable and runs its stages and models.
        A worker is a calculator: it computes, and the server keeps every request.""",
    ),
    fact(
        """What is replay?
        Explain replay.
        What happens to my text when a worker dies?""",
        """The server keeps the known tokens and computes them again on another worker.
        Replay computes the same tokens again, so the client sees a pause and no error.""",
    ),
    fact(
        """What if a request kills a worker?
        What happens to a request that kills workers?
        What is a poisonous request?""",
        """It runs alone the next time. If the worker dies again, the request fails with WorkerLost.
        It is tried alone, and if that kills the worker too, it fails and is not tried again.""",
    ),
    fact(
        """What is a replica?
        What are replicas?
        How do I get two replicas?""",
        """A replica is one more worker with the same servable. Use --device-ids 0,1 for two.
        Each device id is one replica, so --device-ids 0,1 gives two of them.""",
    ),
    fact(
        """Which formats can Inflight load?
        Which models can I serve?
        What kinds of models does Inflight serve?
        Which model formats are there?""",
        """ONNX, TorchScript, torch.export, MindIR, any Python callable, and language models.
        Inflight serves ONNX, TorchScript, torch.export and MindIR files, Python callables and language models.""",
    ),
    fact(
        """How do I see the metrics?
        Where are the metrics?
        Does Inflight have metrics?""",
        """Send GET to /metrics on the HTTP port.
        The metrics are at /metrics, in the format of Prometheus.""",
    ),
    fact(
        """How do I check the health?
        How do I know that the server is ready?
        Where is the health check?
        Is the server ready?""",
        """Send GET to /health/ready on the HTTP port.
        Ask /health/ready. It answers 200 when every servable can answer.""",
    ),
    fact(
        """What is the router?
        What does the router do?
        Who owns a request?""",
        """The router owns every request and decides which worker computes it.
        The router lives in the server and gives work to the replicas.""",
    ),
    fact(
        """What is the scheduler?
        What does the scheduler do?
        Explain the scheduler.""",
        """The scheduler plans each step: who joins, who leaves and who gets how many tokens.
        For each step the scheduler decides which tokens are computed.""",
    ),
    fact(
        """What is a shard?
        What are shards?
        What is tensor parallel?
        Can a model run on two devices?""",
        """A shard is one part of a model. With tensor parallel several shards compute together.
        Tensor parallel splits a model into shards, one for each rank.""",
    ),
    fact(
        """Can Inflight stream?
        What is streaming?
        Does Inflight stream tokens?""",
        """Yes. The client gets each token as soon as it is computed.
        Streaming sends every token at once instead of waiting for the whole text.""",
    ),
    fact(
        """Does the answer depend on other requests?
        Do my neighbours change my result?
        Do other requests change my answer?""",
        """No. A request gets the same tokens alone and in a crowd.
        No, a result does not depend on the neighbours.""",
    ),
    fact(
        """What happens when the server is full?
        What does the server do when there are too many requests?
        What happens when the queue is full?""",
        """New requests are refused at once with 429.
        Every queue is bounded, and a full server refuses new requests at once.""",
    ),
    fact(
        """What happens when a client leaves?
        What if I close the connection?
        What happens when a client disconnects?""",
        """Its request is cancelled, and what it held becomes free.
        The server cancels the request and frees what it held.""",
    ),
    fact(
        """Does Inflight work with MindSpore Serving?
        Can I use scripts of MindSpore Serving?
        Can I keep my MindSpore scripts?""",
        """Yes. Scripts, servables and clients of MindSpore Serving run unchanged.
        Yes, scripts and clients written for MindSpore Serving still work.""",
    ),
    fact(
        """Which Python do I need?
        Which version of Python do I need?
        Does Inflight need Python?""",
        """You need Python 3.10 or newer.
        Inflight needs Python 3.10 or newer.""",
    ),
    fact(
        """How do I run the demo?
        How do I try Inflight?
        Is there a demo?""",
        """Write make demo and wait for the line that you can paste.
        The command make demo starts a server that you can try.""",
    ),
    fact(
        """How do I run the tests?
        How do I test Inflight?
        Which command runs the tests?""",
        """Write make test.
        The command make test runs all of them.""",
    ),
    fact(
        """Who are you?
        What are you?
        What is your name?
        Tell me about yourself.
        Introduce yourself.""",
        """I am Pocket, a small model that comes with Inflight.
        My name is Pocket. I am a small language model, and I come with Inflight.""",
    ),
    fact(
        """What can you do?
        What do you know?
        How can you help me?
        What can I ask you?""",
        """I can tell small stories and answer questions about Inflight.
        I know small stories, easy questions and Inflight.""",
    ),
    fact(
        """How big are you?
        How many parameters do you have?
        Are you a big model?""",
        """I am very small: I have about two million parameters.
        I have about two million parameters, which is very few.""",
    ),
    fact(
        """Who made you?
        Who trained you?
        Where do you come from?""",
        """A script in the repository of Inflight trained me.
        I was trained by a script that comes with Inflight.""",
    ),
)

CHATTER = (
    fact(
        """Hello!
        Hi!
        Hello there!
        Good morning!
        Good evening!
        Hey!""",
        """Hello! How can I help you?
        Hello! What would you like to know?
        Hi! Shall I tell you a story?""",
    ),
    fact(
        """How are you?
        How do you do?
        Are you well?""",
        """I am well, thank you. How can I help you?
        I am fine, thank you.""",
    ),
    fact(
        """Thank you!
        Thanks!
        Thank you very much.
        Thanks a lot!""",
        """You are welcome!
        You are welcome. Ask me more if you like.""",
    ),
    fact(
        """Goodbye!
        Bye!
        See you later!
        Good night!""",
        """Goodbye! It was nice to talk to you.
        Goodbye! Come back soon.""",
    ),
)

OPPOSITES = dict(
    pair.split()
    for pair in (
        *(
            "big small",
            "hot cold",
            "fast slow",
            "old new",
            "good bad",
            "happy sad",
            "light dark",
            "high low",
            "long short",
        ),
        *(
            "day night",
            "up down",
            "in out",
            "open closed",
            "full empty",
            "loud quiet",
            "wet dry",
            "rich poor",
            "near far",
        ),
        *(
            "early late",
            "hard soft",
            "strong weak",
            "clean dirty",
            "left right",
            "black white",
            "first last",
            "thick thin",
        ),
        *("true false", "always never", "begin end", "push pull", "win lose", "give take", "above below"),
    )
)
OPPOSITES |= {other: word for word, other in OPPOSITES.items()}

COLOUR_OF = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "a banana": "yellow",
    "the sun": "yellow",
    "coal": "black",
    "a tomato": "red",
    "milk": "white",
    "a carrot": "orange",
    "chocolate": "brown",
    "a leaf": "green",
    "blood": "red",
    "a lemon": "yellow",
    "the night": "black",
    "a cherry": "red",
    "a frog": "green",
    "an elephant": "grey",
    "a pig": "pink",
    "salt": "white",
    "the sea": "blue",
    "gold": "golden",
    "a strawberry": "red",
    "a cloud": "white",
}

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "England": "London",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Austria": "Vienna",
    "Portugal": "Lisbon",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Hungary": "Budapest",
    "Cuba": "Havana",
    "Canada": "Ottawa",
    "Peru": "Lima",
    "Kenya": "Nairobi",
    "Belgium": "Brussels",
    "Turkey": "Ankara",
}

SOUNDS = {
    "dog": "woof",
    "cat": "meow",
    "cow": "moo",
    "duck": "quack",
    "sheep": "baa",
    "pig": "oink",
    "horse": "neigh",
    "owl": "hoot",
    "lion": "roar",
    "mouse": "squeak",
    "frog": "croak",
    "bee": "buzz",
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)

REFUSALS = (
    "I am sorry, I only know small stories and Inflight.",
    "Sorry, I do not know that. I only know small stories and Inflight.",
)
# Topics that are beyond a model of this size; each is combined with each way to ask.
UNKNOWN_TOPICS = (
    *("politics", "football", "the stock market", "quantum physics", "cancer", "the weather in London", "history"),
    *("philosophy", "the meaning of life", "cars", "the war", "my taxes", "my health", "the law", "chess", "movies"),
    *("the president", "rockets", "the moon landing", "black holes", "evolution", "bitcoin", "computers", "guitars"),
    *("the internet", "airplanes", "jazz music", "the Roman Empire", "dinosaurs", "vaccines", "climate change"),
    *("the economy", "a good restaurant", "my homework", "tennis", "fashion", "the best phone", "French wine"),
)
UNKNOWN_FORMS = (
    *("Tell me about {}.", "What do you think about {}?", "Explain {}.", "What do you know about {}?"),
    *("Write an essay about {}.", "Can you help me with {}?", "Give me advice on {}.", "What is new about {}?"),
    *("I have a question about {}.", "Why is everybody talking about {}?", "Write a poem about {}."),
)
UNKNOWN = (
    *("Who won the match yesterday?", "What time is it?", "What is the weather today?", "How old is the universe?"),
    *("Write a program in Java.", "Translate this text into French.", "How do I lose weight?", "What is love?"),
    *("Who wrote Hamlet?", "How far away is the moon?", "Which stocks should I buy?", "How do I cook rice?"),
    *("What is the square root of 1000?", "How tall is the Eiffel Tower?", "Who is the richest man in the world?"),
    *("Can you book a flight for me?", "Solve this equation for me.", "What is DNA?", "Who was Napoleon?"),
    *("How do I fix my car?", "Recommend a good book.", "What is the speed of light?", "Sing the national anthem."),
    *("How do I get a new passport?", "Why do people dream?", "When was the Second World War?", "Play some music."),
)
