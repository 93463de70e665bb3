// The service's HTTP interface: requests with the API key, streams, and every failure as one kind of error.

import { events } from "./sse.js";

const KEY = "nexus-ray.api-key";

/**
 * A request that came to nothing. `status` is the HTTP status, 0 where there was none; `retryAfter` is in seconds;
 * `network` is true when the connection failed.
 */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null, network = false } = {}) {
    super(message);
    Object.assign(this, { status, retryAfter, network });
  }
}

/** The API key of this browser tab, or null. */
export const apiKey = () => sessionStorage.getItem(KEY);

/** Keep an API key until the tab closes, or forget it (null or ""); whoever waits for one hears of it. */
export function setApiKey(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  document.dispatchEvent(new CustomEvent("apikey"));
}

/** Model ids: the base, then the students. */
export async function listModels() {
  const { data } = await json(await request("v1/models"));
  if (!Array.isArray(data) || !data.length) throw new ApiError("The service lists no models.");
  return data.map((card) => String(card.id));
}

/** Perplexity of one text under some models. */
export async function perplexity(text, models, signal) {
  const answer = await json(await request("v1/perplexity", { text, models, token_logprobs: true }, signal), signal);
  const result = answer.results?.[0];
  const scored = result?.tokens?.length;
  const whole = (score) => score?.token_logprobs?.length === scored;
  if (!scored || result.offsets?.length !== scored || !models.every((model) => whole(result.scores?.[model]))) {
    throw new ApiError("The answer of /v1/perplexity lacks tokens, offsets or the scores of a model.");
  }
  return result;
}

/** The chunks of a streamed chat answer. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", { ...body, stream: true }, signal);
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(messageOf(chunk) ?? "The answer failed.");
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
    if (error instanceof SyntaxError) throw new ApiError("The stream holds an event that is not JSON.");
    throw new ApiError("The connection broke in the middle of the answer.", { network: true });
  }
  throw new ApiError("The stream ended before the answer was complete.", { network: true });
}

async function request(path, body, signal) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached. Is it running, and is the network up?", { network: true });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function json(response, signal) {
  try {
    return await response.json();
  } catch (error) {
    if (signal?.aborted) throw error;
    const network = !(error instanceof SyntaxError);
    throw new ApiError(network ? "The connection broke." : "The answer is not JSON.", { network });
  }
}

async function refusal(response) {
  const text = await response.text().catch(() => "");
  const spoken = text.trimStart().startsWith("<") ? "" : text.trim().slice(0, 300);
  const message = messageOf(parse(text)) ?? (spoken || response.statusText || "The server gave no reason.");
  return new ApiError(message, { status: response.status, retryAfter: retryAfter(response.headers) });
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function messageOf(answer) {
  const error = answer?.error;
  const message = typeof error === "string" ? error : error?.message;
  return typeof message === "string" && message ? message : null;
}

/** Retry-After in seconds, from seconds or a date; null when there is none. */
function retryAfter(headers) {
  const value = headers.get("Retry-After");
  if (value === null) return null;
  const seconds = /^\d+$/.test(value.trim()) ? Number(value) : (Date.parse(value) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}
