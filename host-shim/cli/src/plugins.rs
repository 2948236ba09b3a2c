//! Where the plugins of a command line may come from.

use std::path::{Path, PathBuf};

use kvhook_host::load::{Policy, is_bare_name};

/// The host's plugin folders, and those of plugins that are named by a path: who types a path trusts it.
///
/// A bare name is looked up in the former first, so that a file beside a named one cannot stand in for it.
pub fn folders<'a>(plugins: impl IntoIterator<Item = &'a str>) -> Vec<PathBuf> {
    let mut folders = Policy::new(Vec::new(), None).folders;
    for plugin in plugins.into_iter().filter(|plugin| !is_bare_name(plugin)) {
        // A path that leads nowhere is refused when it is opened.
        let folder = std::path::absolute(plugin).ok().and_then(|path| path.parent().map(Path::to_owned));
        folders.extend(folder.filter(|folder| !folders.contains(folder)));
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_bring_their_folders_and_names_do_not() {
        let usual = folders(["truncate", "noop"]);
        assert_eq!(usual, Policy::new(Vec::new(), None).folders);
        let more = folders(["/opt/a/libkvhook_x.so", "truncate", "/opt/a/libkvhook_y.so"]);
        assert_eq!(more[..usual.len()], usual);
        assert_eq!(more[usual.len()..], [PathBuf::from("/opt/a")]);
    }
}
