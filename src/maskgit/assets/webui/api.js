// The server's endpoints. Every failure is a Problem whose message is for people.

export class Problem extends Error {}

const GONE = "The server cannot be reached. Start it again, or check the connection, then try once more.";
// The server says something at least every five seconds while it works.
const SILENCE = 30_000;

// Seeds have up to 64 bits, more than JavaScript's numbers: they are strings on this page.
const parse = text => JSON.parse(text.replace(/"seed":\s*(\d+)/g, '"seed":"$1"'));
const dump = value => JSON.stringify(value).replace(/"seed":"(\d+)"/g, '"seed":$1');

async function send(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(GONE);
  }
  if (answer.ok) return answer;
  let message = `The server answered with status ${answer.status}.`;
  try { message = (await answer.json()).error.message; } catch { /* It is a proxy's answer. */ }
  throw new Problem(message);
}

function request({ path, fields, files = {} }, signal, stream) {
  fields = stream ? { ...fields, stream: true } : fields;
  if (!Object.keys(files).length)
    return send(path, { method: "POST", body: dump(fields), headers: { "content-type": "application/json" }, signal });
  const body = new FormData();
  for (const [name, value] of Object.entries(fields)) body.append(name, name === "seed" ? value : JSON.stringify(value));
  for (const [name, file] of Object.entries(files)) body.append(name, file, name);
  return send(path, { method: "POST", body, signal });
}

export const get = async path => parse(await (await send(path)).text());
export const post = async (call, signal) => parse(await (await request(call, signal)).text());

// Calls on[event](data) for what comes before the result, and returns the result.
export async function stream(call, on, signal) {
  const reader = (await request(call, signal, true)).body.getReader();
  const decoder = new TextDecoder();
  let text = "", watch;
  const silent = () => new Promise((_, reject) => {
    clearTimeout(watch);
    watch = setTimeout(() => reject(new Problem(GONE)), SILENCE);
  });
  try {
    for (;;) {
      const { done, value } = await Promise.race([reader.read(), silent()]);
      if (done) throw new Problem(GONE);
      text += decoder.decode(value, { stream: true });
      const parts = text.split("\n\n");
      text = parts.pop();
      for (const part of parts) {
        const name = /^event: (.*)$/m.exec(part)?.[1];
        if (!name) continue;
        const data = parse(/^data: (.*)$/m.exec(part)[1]);
        if (name === "result") return data;
        if (name === "error") throw new Problem(data.error.message);
        on[name]?.(data);
      }
    }
  } catch (error) {
    reader.cancel().catch(() => {});
    if (error instanceof Problem || error.name === "AbortError") throw error;
    throw new Problem(GONE);
  } finally {
    clearTimeout(watch);
  }
}
