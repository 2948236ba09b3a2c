//! JSON written at compile time, so that metadata can stand in a static.

/// Appends JSON to a byte slice, in const context. Past the slice's end it only counts: a first pass with
/// an empty slice gives the length, a second one writes.
pub struct ConstJson<'a> {
    out: &'a mut [u8],
    length: usize,
}

impl<'a> ConstJson<'a> {
    /// Writes from the start of `out`.
    pub const fn new(out: &'a mut [u8]) -> Self {
        Self { out, length: 0 }
    }

    /// Bytes so far, whether or not they fitted.
    pub const fn length(&self) -> usize {
        self.length
    }

    const fn byte(&mut self, byte: u8) {
        if self.length < self.out.len() {
            self.out[self.length] = byte;
        }
        self.length += 1;
    }

    /// Appends `text` as it is.
    pub const fn raw(&mut self, text: &str) {
        let bytes = text.as_bytes();
        let mut i = 0;
        while i < bytes.len() {
            self.byte(bytes[i]);
            i += 1;
        }
    }

    /// Appends `text` as a JSON string without its quotes.
    pub const fn escaped(&mut self, text: &str) {
        let bytes = text.as_bytes();
        let mut i = 0;
        while i < bytes.len() {
            match bytes[i] {
                b'"' => self.raw("\\\""),
                b'\\' => self.raw("\\\\"),
                b'\n' => self.raw("\\n"),
                b'\r' => self.raw("\\r"),
                b'\t' => self.raw("\\t"),
                control if control < 0x20 => {
                    self.raw("\\u00");
                    self.byte(hex_digit(control >> 4));
                    self.byte(hex_digit(control & 15));
                }
                other => self.byte(other),
            }
            i += 1;
        }
    }

    /// Appends `text` as a JSON string.
    pub const fn text(&mut self, text: &str) {
        self.byte(b'"');
        self.escaped(text);
        self.byte(b'"');
    }

    /// Appends a number.
    pub const fn number(&mut self, value: u64) {
        if value >= 10 {
            self.number(value / 10);
        }
        self.byte(b'0' + (value % 10) as u8);
    }

    /// Appends `0x` and 16 digits, as a JSON string: a JSON number would lose bits in many readers.
    pub const fn hex(&mut self, value: u64) {
        self.raw("\"0x");
        let mut shift = 64;
        while shift > 0 {
            shift -= 4;
            self.byte(hex_digit(((value >> shift) & 15) as u8));
        }
        self.byte(b'"');
    }

    /// Appends `name` as a key, with a comma before it unless it opens an object.
    pub const fn key(&mut self, name: &str, first: bool) {
        if !first {
            self.byte(b',');
        }
        self.text(name);
        self.byte(b':');
    }
}

const fn hex_digit(value: u8) -> u8 {
    if value < 10 { b'0' + value } else { b'a' + value - 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn sample(out: &mut [u8]) -> usize {
        let mut json = ConstJson::new(out);
        json.raw("{");
        json.key("a\"b\\\n\u{1}é", true);
        json.number(1_203);
        json.key("hash", false);
        json.hex(0xfe01);
        json.raw("}");
        json.length()
    }

    #[test]
    fn const_json_is_json() {
        const LENGTH: usize = sample(&mut []);
        const BYTES: [u8; LENGTH] = {
            let mut out = [0; LENGTH];
            sample(&mut out);
            out
        };
        let value: serde_json::Value = serde_json::from_slice(&BYTES).unwrap();
        let expected = serde_json::json!({"a\"b\\\n\u{1}é": 1203, "hash": "0x000000000000fe01"});
        assert_eq!(value, expected);
    }
}
