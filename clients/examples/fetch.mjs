// JavaScript's fetch, in a browser or in Node 18 and later: node fetch.mjs [URL]
const url = process.argv[2] ?? "http://127.0.0.1:8000";

async function* chat(messages, options) {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ messages, stream: true, ...options }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let rest = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    const events = (rest + text).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk.choices[0].delta.content ?? "";
    }
  }
  throw new Error("The stream ended before it was complete.");
}

const messages = [{ role: "user", content: "Name three rivers." }];
for await (const text of chat(messages, { max_tokens: 32, temperature: 0 })) {
  process.stdout.write(text);
}
process.stdout.write("\n");
