/** Searches names, by a regular expression and as plain text. Pure functions. */

/** Returns `{matches(name), problem}`: `problem` is why the text is not a regular expression; it then is plain text. */
export function matcher(text) {
  const wanted = text.trim();
  const plain = wanted.toLowerCase();
  let expression = null;
  let problem = null;
  try {
    expression = new RegExp(wanted, "i");
  } catch (error) {
    const reason = error.message.slice(error.message.lastIndexOf(": ") + 1).trim();
    problem = `“${wanted}” is not a regular expression (${reason}); searching for plain text.`;
  }
  // A name that contains the text itself always matches: “val(1)” finds itself.
  const matches = (name) => name.toLowerCase().includes(plain) || (expression?.test(name) ?? false);
  return { matches, problem };
}
