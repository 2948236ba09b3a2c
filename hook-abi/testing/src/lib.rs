//! A mock engine for tests of kvhook plugins, in Rust or in C, without any real engine.
//!
//! An [`Engine`] is a model's shape and what is offered; [`Engine::create`] makes an [`Instance`] of a plugin by its C
//! entry, as a host does. A [`Sequence`] is a cache with seeded data, in any [`Form`] and dtype. Every call also checks
//! what holds for all plugins, and answers with a [`Fault`] where it does not:
//!
//! - nothing of the cache is written, nor anything outside the memory and the structs that were lent (guard bands);
//! - a plan keeps exactly its bound (or fewer, where the engine offers that), its rows ascend and exist;
//! - a bound is not above the length, and what it says to keep is kept.
//!
//! [`captured()`] has real keys, values and queries; [`conformance`] has the rules that every plugin keeps.
//!
//! ```ignore
//! use kvhook_testing::{Dtype, Engine, Form, Random, Sequence, Shape};
//!
//! const SHAPE: Shape = Shape { layers: 2, kv_heads: 2, q_heads: 4, head_dim: 8, first_kv_head: 0, total_kv_heads: 2 };
//!
//! #[test]
//! fn keeps_a_quarter() {
//!     let mut instance = Engine::new(SHAPE).create(kvhook_testing::entry!(my_plugin), "keep=0.25").unwrap();
//!     let prompt = Sequence::random(1, 100, SHAPE, Dtype::F16, Form::Paged { block: 16 }, &mut Random::new(7));
//!     let answer = instance.plan_one(&prompt).unwrap();
//!     assert!(answer.select().iter().all(|layer| layer.count == 25));
//! }
//! ```

pub mod answer;
pub mod arrays;
pub mod assertions;
pub mod cache;
pub mod captured;
pub mod clock;
pub mod conformance;
pub mod engine;
pub mod fault;
pub mod guarded;
pub mod host;
pub mod instance;
pub mod random;
pub mod sequence;

pub use answer::{Answer, LayerPlan, NewRows};
pub use arrays::{Array, Message, array, array_mut};
pub use cache::{Form, Layer, PerHead};
pub use captured::captured;
pub use engine::{Engine, Shape};
pub use fault::Fault;
pub use host::Host;
pub use instance::{Bounded, Event, Instance, Needs, Seen};
pub use kvhook_abi::kernels::Dtype;
pub use random::Random;
pub use sequence::Sequence;

/// The entry of a plugin that is linked into the test: of the crate that is named, which has to export one.
#[macro_export]
macro_rules! entry {
    ($plugin:ident) => {{
        // Links the plugin, whose entry is declared below.
        use $plugin as _;
        unsafe extern "C" {
            safe fn kvh_plugin_entry_v1() -> *const $crate::raw::KvhPluginEntry;
        }
        // SAFETY: an entry is a static, never null.
        unsafe { &*kvh_plugin_entry_v1() }
    }};
}

#[doc(hidden)]
pub use kvhook_abi::raw;
