"""A language model between two Python functions: clients send an animal and a name and get a title and a story."""

from inflight.servable import add_stage, declare_generator, register_method

pocket = declare_generator("../../../models/pocket", kv_cache_memory=64 << 20, max_total_tokens=512)


def ask(animal, name):
    """The prompt, as the model's chat template writes it, and how to go on from it."""
    prompt = f"<|begin|><|user|>Tell me a story about a {animal} called {name}.<|end|><|assistant|>"
    return prompt, '{"max_new_tokens": 300, "add_special_tokens": false}'


def title(name, story):
    return f"The story of {name}", story.strip()


@register_method(output_names=("title", "story"))
def tell(animal, name):
    prompt, parameters = add_stage(ask, animal, name, outputs_count=2)
    story = add_stage(pocket, prompt, parameters, outputs_count=1)
    return add_stage(title, name, story, outputs_count=2)
