// Server-sent events out of a response body, as the HTML standard reads them.

/** The data of each event, as text. A stream that breaks throws what the reader throws. */
export async function* events(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let lines = new Lines();
  let data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return; // an event that no empty line ended is no event
      for (const line of lines.take(decoder.decode(value, { stream: true }))) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the stream may be broken already
  }
}

/** Cuts text that comes in pieces into lines that end with LF, CR LF or CR. */
class Lines {
  #rest = "";

  take(text) {
    this.#rest += text;
    const whole = this.#rest.endsWith("\r") ? this.#rest.slice(0, -1) : this.#rest; // LF may follow
    const lines = whole.split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + this.#rest.slice(whole.length);
    return lines;
  }
}
