//! A number hidden in the prompt that the model has to give back (E5).

/// A five-digit key that follows from the passage's index, so that runs can be repeated.
pub fn key(passage: usize) -> String {
    // Knuth's multiplicative hash spreads neighbouring indices over the range.
    let hash = (passage as u64 + 1).wrapping_mul(2_654_435_761) % 90_000;
    (10_000 + hash).to_string()
}

/// The sentences that hide `key` in a text.
pub fn sentence(key: &str) -> String {
    format!("\nThe secret pass key is {key}. Remember it. {key} is the secret pass key.\n")
}

/// The question that is appended after compression; the model has to go on with the key.
pub const QUESTION: &str = "\nWhat is the secret pass key? The secret pass key is";

/// Whether `answer` begins with `key`, leaving spaces and punctuation before it aside.
pub fn found(answer: &str, key: &str) -> bool {
    answer.trim_start_matches(|c: char| !c.is_alphanumeric()).strip_prefix(key).is_some_and(|rest| {
        // 123456 is not an answer to 12345.
        !rest.starts_with(|c: char| c.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_five_digits_and_differ() {
        let keys: std::collections::BTreeSet<_> = (0..100).map(key).collect();
        assert_eq!(keys.len(), 100);
        assert!(keys.iter().all(|key| key.len() == 5));
    }

    #[test]
    fn only_the_whole_key_counts() {
        assert!(found(" 12345. Remember", "12345"));
        assert!(found(": **12345**", "12345"));
        assert!(!found(" 123456", "12345"));
        assert!(!found(" 1234", "12345"));
        assert!(!found(" not 12345", "12345"));
    }
}
