// Lists and contents of completions, in the form that oreal_jax/report/embed.py writes.

async function inflate(base64) {
  const letters = atob(base64);
  const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const utf8 = new TextDecoder();

async function readTable(base64) {
  return JSON.parse(utf8.decode(await inflate(base64)));
}

// Returns {question, gold, text, reason, exact, tokens: [string], omitted: Map,
// values: {name: Float32Array}}; without tokens and values if only the text is known.
async function readContent(base64, advantage) {
  const bytes = await inflate(base64);
  const end = bytes.indexOf(0);
  const content = JSON.parse(utf8.decode(bytes.subarray(0, end)));
  const count = content.tokens ?? 0;
  let position = end + 1, letter = 0;
  const tokens = [];
  for (let token = 0; token < count; token++) {
    let length = 0, shift = 0, byte;
    do {
      byte = bytes[position++];
      length |= (byte & 127) << shift;
      shift += 7;
    } while (byte & 128);
    tokens.push(content.text.slice(letter, letter + length));
    letter += length;
  }
  const values = {};
  for (const [name, low, high] of content.planes ?? []) {
    const codes = bytes.subarray(position, position + count);
    values[name] = Float32Array.from(codes, (code) => low + (code / 255) * (high - low));
    position += count;
  }
  if (values.weight) values.advantage = values.weight.map((weight) => weight * advantage);
  return { ...content, tokens, values, omitted: new Map(content.omitted ?? []) };
}
