/**
 * Takes secrets out of a text that goes to a log: private keys in PEM (also cut off ones), JSON web tokens, bearer
 * credentials. A safety net: nobody is meant to pass secrets here.
 */
export function redact(text: string): string {
  if (!/PRIVATE KEY|eyJ|bearer /i.test(text)) return text;
  return text
    .replace(
      /-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)/g,
      "<private key removed>",
    )
    .replace(/\beyJ[\w-]{5,}(?:\.[\w-]*){0,4}/g, "<token removed>")
    .replace(/\b(bearer )(?!<token removed>)[\w.~+/=-]+/gi, "$1<token removed>");
}
