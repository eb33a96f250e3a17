/** Control characters, which could drive a terminal, become spaces. */
export const printable = (text: string): string => text.replace(/\p{Cc}+/gu, " ");
