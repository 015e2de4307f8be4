//! How the program is linked, so that a command starts fast: a process that only asks the daemon never needs the database, whose
//! code is most of the program.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Puts the initializers of the database's C++ into a section of their own, which `sys::process::initialize_database` runs.
const SECTIONS: &str = "SECTIONS {
    .late_init (TYPE = SHT_INIT_ARRAY) : {
        HIDDEN(late_init_start = .);
        KEEP(*librocksdb_sys*:*(SORT_BY_INIT_PRIORITY(.init_array.*)))
        KEEP(*librocksdb_sys*:*(.init_array))
        HIDDEN(late_init_end = .);
    }
} INSERT BEFORE .init_array;
";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names OUT_DIR"));
    let script = folder.join("sections.ld");
    std::fs::write(&script, SECTIONS).expect("OUT_DIR can be written to");
    println!("cargo::rustc-link-arg=-Wl,-T,{}", script.display());
    link_libstdcxx(&folder);
    if libc_packs_relocations() {
        println!("cargo::rustc-link-arg=-Wl,-z,pack-relative-relocs");
    }
}

/// Whether the C library applies relocations that are packed (glibc from 2.36 on): there are 30,000 of the database's, and reading
/// them one by one takes a third of the time in which a command starts.
fn libc_packs_relocations() -> bool {
    let version = || {
        let answer = Command::new("getconf")
            .arg("GNU_LIBC_VERSION")
            .output()
            .ok()?;
        let text = String::from_utf8(answer.stdout).ok()?;
        let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
        let minor = minor.split('.').next()?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    };
    let of_target = std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu")
        && std::env::var("HOST").ok() == std::env::var("TARGET").ok();
    of_target && version().is_some_and(|version| version >= (2, 36))
}

/// Links libstdc++ in. The linker takes the first folder with one in any form; one that holds the archive alone settles it.
fn link_libstdcxx(folder: &Path) {
    let Some(archive) = archive() else {
        println!("cargo::warning=no libstdc++.a: the program will load libstdc++ when it starts");
        return;
    };
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
