//! Byte-pair encoding from the GGUF's own vocabulary.
//!
//! candle's converter puts a space before every segment, also behind a special token, which the model never saw in
//! training; so the pipeline is put together here.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::gguf::Gguf;
use crate::error::{Error, Result};

/// `tokenizer.ggml.token_type` of a control token, such as `<|im_start|>`.
const CONTROL: usize = 3;
/// `tokenizer.ggml.token_type` of a token that is matched before merging, but is text.
const USER_DEFINED: usize = 4;

/// Llama 3's split into words, as its published tokenizer states it.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Text to token ids and back.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Put before a text by [`encode_text`](Self::encode_text), where the model wants it.
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Tokenizer {
    pub(super) fn read(gguf: &Gguf) -> Result<Self> {
        let kind = gguf.string("tokenizer.ggml.model")?;
        if kind != "gpt2" {
            return Err(Error::UnsupportedModel {
                what: format!("a tokenizer of kind \"{kind}\" (tokenizer.ggml.model), not the byte-pair one \"gpt2\""),
            });
        }
        let tokens = gguf.strings("tokenizer.ggml.tokens")?;
        let merge = |text: String| match text.split_once(' ') {
            Some((left, right)) => Ok((left.to_owned(), right.to_owned())),
            None => Err(Error::Tokenizer { reason: format!("merge \"{text}\" is not two tokens and a space") }),
        };
        let merges = gguf.strings("tokenizer.ggml.merges")?.into_iter().map(merge).collect::<Result<Vec<_>>>()?;
        let vocab: Vocab = tokens.iter().cloned().zip(0..).collect();
        let bpe = BPE::builder().vocab_and_merges(vocab, merges).build().map_err(refused)?;
        let mut inner = tokenizers::Tokenizer::new(bpe);
        inner.with_pre_tokenizer(Some(words(gguf)?));
        inner.with_decoder(Some(ByteLevel::new(false, false, true)));
        let kinds = gguf.counts("tokenizer.ggml.token_type")?;
        let of_kind = |wanted: usize| tokens.iter().zip(&kinds).filter(move |(_, kind)| **kind == wanted);
        inner
            .add_special_tokens(of_kind(CONTROL).map(|(token, _)| AddedToken::from(token.clone(), true)))
            .map_err(refused)?;
        inner
            .add_tokens(of_kind(USER_DEFINED).map(|(token, _)| AddedToken::from(token.clone(), false)))
            .map_err(refused)?;
        let id = |key: &str| gguf.optional_count(key).map(|id| id.and_then(|id| u32::try_from(id).ok()));
        let bos = match gguf.flag("tokenizer.ggml.add_bos_token")? {
            Some(true) => id("tokenizer.ggml.bos_token_id")?,
            _ => None,
        };
        Ok(Self { inner, bos, eos: id("tokenizer.ggml.eos_token_id")? })
    }

    /// Token ids of a text; special tokens written out in it become their ids. Nothing is put before it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the library refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.inner.encode_fast(text, false).map_err(refused)?.get_ids().to_vec())
    }

    /// Token ids of a text that begins a context: with the model's begin-of-text token, if it wants one.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_text(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids: Vec<u32> = self.bos.into_iter().collect();
        ids.extend(self.encode(text)?);
        Ok(ids)
    }

    /// The text of some tokens, without special tokens. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] where the library refuses the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(refused)
    }

    /// The token that ends an answer.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// A ChatML prompt: a system message, if any, a user message, and the beginning of the assistant's answer.
    pub fn chat(system: Option<&str>, user: &str) -> String {
        let system = system.map(|text| format!("<|im_start|>system\n{text}<|im_end|>\n")).unwrap_or_default();
        format!("{system}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")
    }
}

/// How text is cut into words before merging.
fn words(gguf: &Gguf) -> Result<PreTokenizerWrapper> {
    let gpt2 = ByteLevel::new(false, true, true);
    match gguf.optional_string("tokenizer.ggml.pre")?.as_deref() {
        Some("smollm") => Ok(Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into()),
        Some("gpt-2" | "gpt2" | "default") | None => Ok(gpt2.into()),
        Some("llama-bpe" | "llama3" | "llama-v3") => {
            let pattern = SplitPattern::Regex(LLAMA3_WORDS.into());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map_err(refused)?;
            Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
        }
        Some(other) => {
            Err(Error::UnsupportedModel { what: format!("the word splitter \"{other}\" (tokenizer.ggml.pre)") })
        }
    }
}

fn refused(error: tokenizers::Error) -> Error {
    Error::Tokenizer { reason: error.to_string() }
}
