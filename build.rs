//! Links libstdc++ into the program: loading and binding it took a third of the time in which a command starts.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The linker takes the first folder with a `libstdc++` in any form. One that holds the archive alone settles it.
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let Some(archive) = archive() else {
        println!("cargo::warning=no libstdc++.a: the program will load libstdc++ when it starts");
        return;
    };
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names OUT_DIR"));
    let link = folder.join("libstdc++.a");
    let _ = std::fs::remove_file(&link);
    if std::os::unix::fs::symlink(&archive, &link).is_ok() {
        println!("cargo::rustc-link-search=native={}", folder.display());
    }
}

/// Where the C++ compiler keeps the archive; a bare name in its answer means that it has none.
fn archive() -> Option<PathBuf> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let answer = Command::new(compiler)
        .arg("-print-file-name=libstdc++.a")
        .output()
        .ok()?;
    let path = Path::new(std::str::from_utf8(&answer.stdout).ok()?.trim()).to_owned();
    path.is_absolute().then_some(path)
}
