//! A second, deep layout check between a Rust host and a Rust plugin, with feature `abi-stable`.
//!
//! `abi_stable` compares whole type trees, behind pointers and in function signatures too. It is no longer
//! maintained, so nothing rests on it: without the feature, or without the symbol in a plugin, the
//! [fingerprints](crate::layout) decide alone. None of its types crosses the boundary.

/// Exports the layouts of this build as symbol `kvh_rust_layout_v1`. Used by [`export_plugin!`](crate::export_plugin).
#[cfg(not(feature = "abi-stable"))]
#[doc(hidden)]
#[macro_export]
macro_rules! export_deep_layout {
    () => {};
}

#[cfg(feature = "abi-stable")]
#[doc(hidden)]
#[macro_export]
macro_rules! export_deep_layout {
    () => {
        #[unsafe(no_mangle)]
        #[allow(non_upper_case_globals)]
        static kvh_rust_layout_v1: $crate::deep::Header = $crate::deep::header();
    };
}

#[cfg(feature = "abi-stable")]
#[allow(dead_code, reason = "the derive makes accessors; only the layout is used")]
mod checked {
    use core::ffi::c_void;
    use core::mem::transmute;

    use abi_stable::StableAbi;
    use abi_stable::abi_stability::abi_checking::{AbiInstabilityErrors, check_layout_compatibility};
    use abi_stable::library::{AbiHeaderRef, CheckTypeLayout, LibHeader, RootModule, RootModuleResult};
    use abi_stable::package_version_strings;
    use abi_stable::prefix_type::PrefixTypeTrait;
    use abi_stable::sabi_types::VersionStrings;

    use crate::raw::*;

    /// Where every type of the contract hangs. Frozen with this generation: a newer root gets another symbol.
    #[repr(C)]
    #[derive(StableAbi)]
    #[sabi(kind(Prefix(prefix_ref = RootRef)))]
    #[sabi(missing_field(panic))]
    pub struct Root {
        entry: extern "C" fn() -> *const KvhPluginEntry,
        on_prefill_done: extern "C" fn() -> *const KvhOnPrefillDone1,
        on_grown: extern "C" fn() -> *const KvhOnGrown1,
        before_attention: extern "C" fn() -> *const KvhBeforeAttention1,
        on_free: extern "C" fn() -> *const KvhOnFree1,
        log: extern "C" fn() -> *const KvhLog1,
        memory: extern "C" fn() -> *const KvhMemory1,
        #[sabi(last_prefix_field)]
        rows: extern "C" fn() -> *const KvhRows1,
    }

    impl RootModule for RootRef {
        abi_stable::declare_root_module_statics! {RootRef}
        const BASE_NAME: &'static str = "kvhook";
        const NAME: &'static str = "kvhook";
        const VERSION_STRINGS: VersionStrings = package_version_strings!();
    }

    /// What the symbol points to.
    pub type Header = LibHeader;

    /// The header of this build.
    pub const fn header() -> Header {
        // SAFETY: the constructor gives a `RootRef`; only its layout is ever looked at.
        unsafe { LibHeader::from_constructor::<RootRef>(root, CheckTypeLayout::Yes) }
    }

    extern "C" fn root() -> RootModuleResult {
        extern "C" fn nothing<T>() -> *const T {
            core::ptr::null()
        }
        abi_stable::library::__call_root_module_loader(|| {
            Root {
                entry: nothing,
                on_prefill_done: nothing,
                on_grown: nothing,
                before_attention: nothing,
                on_free: nothing,
                log: nothing,
                memory: nothing,
                rows: nothing,
            }
            .leak_into_prefix()
        })
    }

    /// Compares a plugin's layouts with ours. `symbol` is the address of its `kvh_rust_layout_v1`.
    ///
    /// # Errors
    /// One line with the first type that differs, and how.
    ///
    /// # Safety
    /// `symbol` is the address of that symbol in a library that is never unloaded.
    pub unsafe fn deep_check(symbol: *const c_void) -> Result<(), String> {
        if symbol.is_null() {
            return Err("the symbol's address is null".to_owned());
        }
        // SAFETY: an `AbiHeaderRef` is the address of a header, which is how abi_stable reads such a symbol.
        let header = unsafe { transmute::<*const c_void, AbiHeaderRef>(symbol) };
        let theirs = header.upgrade().map_err(|error| first_line(&error.to_string()))?;
        let layout = theirs.layout().ok_or("the plugin exports no layouts")?;
        check_layout_compatibility(<RootRef as StableAbi>::LAYOUT, layout).map_err(|errors| explain(&errors))
    }

    /// The deepest place that differs, without the type tree that abi_stable prints (thousands of characters).
    pub(super) fn explain(errors: &AbiInstabilityErrors) -> String {
        let Some(error) = errors.errors.iter().rev().find(|error| !error.errs.is_empty()) else {
            return "the layouts differ".to_owned();
        };
        let path: Vec<String> = error
            .stack_trace
            .iter()
            .map(|step| first_line(&step.expected.to_string()).replace("field_name:", ""))
            .collect();
        let kinds: Vec<String> = error.errs.iter().map(|kind| kind_of(&format!("{kind:?}"))).collect();
        format!("{}: {}", path.join(" > "), kinds.join(", "))
    }

    fn first_line(text: &str) -> String {
        text.lines().next().unwrap_or_default().chars().take(100).collect()
    }

    /// An error's variant and numbers, without the layouts that its debug text may hold.
    fn kind_of(debug: &str) -> String {
        debug.chars().take_while(|letter| *letter != '\n').take(120).collect()
    }
}

#[cfg(feature = "abi-stable")]
pub use checked::{Header, deep_check, header};

#[cfg(all(test, feature = "abi-stable"))]
mod tests {
    use abi_stable::StableAbi;
    use abi_stable::abi_stability::abi_checking::check_layout_compatibility;

    use super::*;

    #[test]
    fn this_build_matches_itself() {
        static HEADER: Header = header();
        // SAFETY: a header of this build, in a static.
        assert_eq!(unsafe { deep_check((&raw const HEADER).cast()) }, Ok(()));
        // SAFETY: null is answered.
        assert!(unsafe { deep_check(core::ptr::null()) }.is_err());
    }

    #[test]
    fn a_mismatch_is_told_in_short() {
        mod theirs {
            #[repr(C)]
            #[derive(abi_stable::StableAbi)]
            pub struct Inner {
                pub a: u64,
                pub b: u64,
            }
            #[repr(C)]
            #[derive(abi_stable::StableAbi)]
            pub struct Args {
                pub inner: *const Inner,
            }
        }
        mod ours {
            #[repr(C)]
            #[derive(abi_stable::StableAbi)]
            pub struct Inner {
                pub a: u64,
            }
            #[repr(C)]
            #[derive(abi_stable::StableAbi)]
            pub struct Args {
                pub inner: *const Inner,
            }
        }
        let errors = check_layout_compatibility(<ours::Args as StableAbi>::LAYOUT, <theirs::Args as StableAbi>::LAYOUT)
            .unwrap_err();
        let text = checked::explain(&errors);
        assert!(text.len() < 600 && text.starts_with("inner > "), "{} characters: {text}", text.len());
    }
}
