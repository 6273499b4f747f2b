// Talks to a server through one of npm's clients, and prints what came back: `node from_node.mjs CLIENT ADDRESS`.
// It is run from the folder that has the packages; the fields are those of from_python.py.
import { readFileSync } from 'node:fs';

const [name, server] = process.argv.slice(2);
const base = `http://${server}/v1`;
const ask = 'What is Inflight?';
const messages = [{ role: 'user', content: ask }];
const city = { enum: ['Bern', 'Oslo'] };
const parameters = { type: 'object', properties: { city }, required: ['city'], additionalProperties: false };
const trip = { type: 'object', properties: { city, days: { type: 'integer', minimum: 1, maximum: 9 } },
  required: ['city', 'days'], additionalProperties: false };
const version = (one) => JSON.parse(readFileSync(`node_modules/${one}/package.json`)).version;

async function count(stream) {
  let pieces = 0;
  for await (const _ of stream) pieces += 1;
  return pieces;
}

const clients = {
  async openai() {
    const { default: OpenAI } = await import('openai');
    const client = new OpenAI({ baseURL: base, apiKey: '-', maxRetries: 0 });
    const common = { model: 'pocket', messages, max_tokens: 200, temperature: 0 };
    const forced = { ...common, tool_choice: 'required', tools: [{ type: 'function', function: { name: 'weather', parameters } }] };
    const format = { type: 'json_schema', json_schema: { name: 'trip', schema: trip, strict: true } };
    const call = (answer) => JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments);
    const responses = client.responses.stream({ model: 'pocket', input: ask, max_output_tokens: 40, store: false });
    if ((await responses.finalResponse()).output[0].type !== 'message') throw new Error('no message in the response');
    for await (const one of client.models.list()) await client.models.retrieve(one.id);
    return {
      version: version('openai'),
      chat: (await client.chat.completions.create(common)).choices[0].message.content,
      pieces: await count(await client.chat.completions.create({ ...common, stream: true, stream_options: { include_usage: true } })),
      call: call(await client.chat.completions.create(forced)),
      streamed: call(await client.chat.completions.stream(forced).finalChatCompletion()),
      object: JSON.parse((await client.chat.completions.create({ ...common, response_format: format })).choices[0].message.content),
    };
  },

  async ai() {
    const { generateText, streamText, generateObject, tool } = await import('ai');
    const { createOpenAICompatible } = await import('@ai-sdk/openai-compatible');
    const { z } = await import('zod');
    const model = createOpenAICompatible({ name: 'inflight', baseURL: base, supportsStructuredOutputs: true })('pocket');
    const common = { model, prompt: ask, maxOutputTokens: 200, temperature: 0 };
    const cities = z.enum(['Bern', 'Oslo']);
    const forced = { ...common, toolChoice: 'required', tools: { weather: tool({ description: 'The weather.', inputSchema: z.object({ city: cities }) }) } };
    return {
      version: version('ai'),
      beside: version('@ai-sdk/openai-compatible'),
      chat: (await generateText(common)).text,
      pieces: await count(streamText(common).textStream),
      call: (await generateText(forced)).toolCalls[0].input,
      streamed: (await streamText(forced).toolCalls)[0].input,
      object: (await generateObject({ ...common, schema: z.object({ city: cities, days: z.number().int().min(1).max(9) }) })).object,
    };
  },

  async agents() {
    const { default: OpenAI } = await import('openai');
    const { Agent, run, setDefaultOpenAIClient, setTracingDisabled, tool } = await import('@openai/agents');
    const { z } = await import('zod');
    setTracingDisabled(true);
    setDefaultOpenAIClient(new OpenAI({ baseURL: base, apiKey: '-', maxRetries: 0 }));
    const cities = z.enum(['Bern', 'Oslo']);
    const called = [];
    const weather = tool({ name: 'weather', description: 'The weather.', parameters: z.object({ city: cities }),
      execute: async (given) => { called.push(given); return `rain in ${given.city}`; } });
    const settings = { maxTokens: 200, temperature: 0, store: false };
    const plain = new Agent({ name: 'plain', instructions: 'Be short.', model: 'pocket', modelSettings: settings });
    const acting = new Agent({ name: 'acting', model: 'pocket', tools: [weather], modelSettings: { ...settings, toolChoice: 'required' } });
    const shaped = new Agent({ name: 'shaped', model: 'pocket', modelSettings: settings,
      outputType: z.object({ city: cities, days: z.number().int().min(1).max(9) }) });
    const whole = await run(plain, ask);
    await run(acting, ask, { maxTurns: 3 });
    const [call] = called.splice(0);
    const streamed = await run(plain, ask, { stream: true });
    const pieces = await count(streamed);
    await streamed.completed;
    const acted = await run(acting, ask, { stream: true, maxTurns: 3 });
    await count(acted);
    await acted.completed;
    return {
      version: version('@openai/agents'), chat: whole.finalOutput, pieces, call, streamed: called[0],
      object: (await run(shaped, ask)).finalOutput,
    };
  },

  async anthropic() {
    const { default: Anthropic } = await import('@anthropic-ai/sdk');
    const client = new Anthropic({ baseURL: `http://${server}`, apiKey: '-', maxRetries: 0 });
    const common = { model: 'pocket', max_tokens: 200, messages };
    const tools = [{ name: 'weather', description: 'The weather.', input_schema: parameters }];
    const forced = { ...common, tools, tool_choice: { type: 'tool', name: 'weather' } };
    const shaped = { ...common, output_config: { format: { type: 'json_schema', schema: trip } } };
    const call = (answer) => answer.content.find((one) => one.type === 'tool_use').input;
    const { input_tokens } = await client.messages.countTokens({ model: 'pocket', messages });
    const answer = await client.messages.create(common);
    if (answer.usage.input_tokens + answer.usage.cache_read_input_tokens !== input_tokens) throw new Error('wrong count');
    return {
      version: version('@anthropic-ai/sdk'),
      chat: answer.content[0].text,
      pieces: await count(client.messages.stream(common)),
      call: call(await client.messages.create(forced)),
      streamed: call(await client.messages.stream(forced).finalMessage()),
      object: JSON.parse((await client.messages.create(shaped)).content[0].text),
    };
  },
};

console.log(JSON.stringify(await clients[name]()));
