// Asks the server; what went wrong is one of three errors, or an answer's own text.

const KEY = "avl-key";

export class NeedsKey extends Error {}
export class Unreachable extends Error {}
export class Refused extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);

/** GET `path`, relative to the page. */
export async function get(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
  let response;
  try {
    const url = new URL(path, document.baseURI);
    const signal = AbortSignal.timeout(10_000);
    response = await fetch(url, { headers, cache: "no-store", signal });
  } catch (error) {
    throw new Unreachable(error.message);
  }
  if (response.status === 401) throw new NeedsKey();
  if (response.ok) return response.json();
  throw new Refused(response.status, await detailOf(response));
}

async function detailOf(response) {
  const text = await response.text();
  try {
    return String(JSON.parse(text).detail ?? text);
  } catch {
    return text || `HTTP ${response.status}`;
  }
}
