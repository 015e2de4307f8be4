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
    match archive("libstdc++.a") {
        Some(archive) => link_archives(
            &folder,
            &[("libstdc++.a", archive)],
            "rustc-link-search=native=",
        ),
        None => println!(
            "cargo::warning=no libstdc++.a: the program will load libstdc++ when it starts"
        ),
    }
    if libc_packs_relocations() {
        println!("cargo::rustc-link-arg=-Wl,-z,pack-relative-relocs");
        link_libc(&folder.join("libc"));
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

/// Links the program with all of the C library in it, and still at an address of chance: to find and to load libraries takes a
/// quarter of the time in which a command starts. Tests and benches are linked as usual.
fn link_libc(folder: &Path) {
    // What rustc names; for the unwinder that it names as a library to load, the archive of the same; and how such a program begins.
    let names = ["c", "m", "dl", "pthread", "rt", "util"].map(|name| format!("lib{name}.a"));
    let same = names.iter().map(|name| (&name[..], &name[..]));
    let found: Option<Vec<_>> = same
        .chain([("libgcc_s.a", "libgcc_eh.a"), ("rcrt1.o", "rcrt1.o")])
        .map(|(link, name)| Some((link, archive(name)?)))
        .collect();
    let Some(found) = found else {
        println!("cargo::warning=no libc.a: the program will load the C library when it starts");
        return;
    };
    link_archives(folder, &found, "rustc-link-arg-bins=-L");
    println!("cargo::rustc-link-arg-bins=-static-pie");
}

/// Has the linker find archives first: it takes the first folder with a library in any form, and one that holds the archive alone
/// settles it.
fn link_archives(folder: &Path, archives: &[(&str, PathBuf)], search: &str) {
    std::fs::create_dir_all(folder).expect("OUT_DIR can be written to");
    for (link, archive) in archives {
        let link = folder.join(link);
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(archive, &link).expect("OUT_DIR can be written to");
    }
    println!("cargo::{search}{}", folder.display());
}

/// Where the C++ compiler keeps an archive; a bare name in its answer means that it has none.
fn archive(name: &str) -> Option<PathBuf> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    let answer = Command::new(compiler)
        .arg(format!("-print-file-name={name}"))
        .output()
        .ok()?;
    let path = Path::new(std::str::from_utf8(&answer.stdout).ok()?.trim()).to_owned();
    path.is_absolute().then_some(path)
}
