//! A plugin that misbehaves on request.
//!
//! Its [config](config::Config) says what it does wrong once it is loaded. What is wrong with the library itself says
//! a mark in the file: a test writes another word over the mark in a copy, which is another plugin by its hash. The
//! words are those of [`variant::WORDS`].

pub mod breaks;
pub mod broken;
pub mod config;
mod count;
mod damage;
mod plugin;
pub mod variant;

pub use plugin::Faulty;

use kvhook_abi::export::Tables;
use kvhook_abi::raw::KvhPluginEntry;

/// The metadata, the same for every variant: what `export_plugin!` makes, with an entry of our own beside it.
#[used]
#[unsafe(link_section = ".kvh_meta")]
static METADATA: [u8; Tables::<Faulty>::DESCRIPTION.section_length()] = Tables::<Faulty>::DESCRIPTION.section();

kvhook_abi::export_deep_layout!();

/// The entry of the variant that the file's mark names.
#[unsafe(no_mangle)]
extern "C" fn kvh_plugin_entry_v1() -> *const KvhPluginEntry {
    // A use that the linker sees keeps the section when it removes what is unused.
    std::hint::black_box(&METADATA);
    variant::entry()
}
