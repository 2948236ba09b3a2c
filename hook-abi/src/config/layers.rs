//! Ranges of layers, as configs write them.

use std::ops::RangeInclusive;

/// The layers that `text` names, of a model with `count` of them: `"3"`, `"0-3"`, or `"4-"` for layer 4 and all behind it.
/// `None` for anything else, and for layers that the model does not have.
pub fn layer_range(text: &str, count: usize) -> Option<RangeInclusive<usize>> {
    let number = |text: &str| text.parse::<usize>().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()));
    let (first, last) = match text.split_once('-') {
        None => (number(text)?, number(text)?),
        Some((first, "")) => (number(first)?, count.checked_sub(1)?),
        Some((first, last)) => (number(first)?, number(last)?),
    };
    (first <= last && last < count).then_some(first..=last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_end_with_the_model() {
        assert_eq!(layer_range("3", 4), Some(3..=3));
        assert_eq!(layer_range("0-3", 4), Some(0..=3));
        assert_eq!(layer_range("2-", 4), Some(2..=3));
        for wrong in ["", "-", "4", "4-", "0-4", "3-2", "-2", "+1", " 1", "1-2-3", "a"] {
            assert_eq!(layer_range(wrong, 4), None, "{wrong:?}");
        }
        assert_eq!(layer_range("0-", 0), None);
    }
}
