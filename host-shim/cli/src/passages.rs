//! Which passages of the texts are measured.

use crate::error::CliError;

/// A run of tokens in one of the texts: its prefix and continuation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Index of the text.
    pub text: usize,
    /// First token in that text.
    pub start: usize,
}

/// Chooses `wanted` passages of `length` tokens that do not overlap, spread evenly over all texts together.
///
/// `tokens` holds the length of each text in tokens. The same arguments give the same passages.
///
/// # Errors
/// [`CliError::TooLittleText`] when fewer passages fit.
pub fn spread(tokens: &[usize], length: usize, wanted: usize) -> Result<Vec<Span>, CliError> {
    let slots: Vec<Span> = tokens
        .iter()
        .enumerate()
        .flat_map(|(text, &tokens)| {
            (0..tokens.checked_div(length).unwrap_or(0)).map(move |slot| Span { text, start: slot * length })
        })
        .collect();
    if slots.len() < wanted {
        return Err(CliError::TooLittleText { found: slots.len(), wanted, length });
    }
    // The middle of each of `wanted` equal parts: neither title pages nor indexes, as far as possible.
    Ok((0..wanted).map(|i| slots[(2 * i + 1) * slots.len() / (2 * wanted)]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passages_are_whole_distinct_and_spread() {
        let spans = spread(&[1000, 50, 460], 100, 4).unwrap();
        let starts: Vec<_> = spans.iter().map(|span| (span.text, span.start)).collect();
        // 10 + 0 + 4 slots; the middles of four parts are slots 1, 5, 8 and 12.
        assert_eq!(starts, [(0, 100), (0, 500), (0, 800), (2, 200)]);
        assert_eq!(spread(&[1000, 50, 460], 100, 14).unwrap().len(), 14);
    }

    #[test]
    fn too_little_text_is_refused() {
        let Err(CliError::TooLittleText { found, wanted, length }) = spread(&[99, 250], 100, 3) else {
            panic!("accepted");
        };
        assert_eq!((found, wanted, length), (2, 3, 100));
        assert!(spread(&[10], 0, 1).is_err());
    }
}
