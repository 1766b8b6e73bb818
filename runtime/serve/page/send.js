// Requests to the server, whose errors are sentences for people.

/** Returns {body} of the answer, or {error}: one sentence. It never throws. */
export async function send(method, path, content, type = "application/json") {
  const headers = content === undefined ? {} : { "Content-Type": type };
  try {
    const answer = await fetch(path, { method, headers, body: content });
    const body = await answer.json();
    if (answer.ok) return { body };
    return { error: body.error ?? `The server answered ${answer.status}.` };
  } catch {
    return { error: "The server did not answer." };
  }
}
