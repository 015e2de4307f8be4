//! How the program is linked, so that a command starts fast: a process that only asks the daemon never needs the database, whose
//! code is most of the program.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
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
/// There are 30,000 relocations of the database's, and reading them one by one takes a third of the time in which a command starts.
/// The C library applies them packed from glibc 2.36 on.
const PACKED: &str = "-Wl,-z,pack-relative-relocs";
/// All of the C library is in the program, which is still at an address of chance: to find and to load libraries takes a quarter of
/// the time in which a command starts.
const STATIC: &str = "-static-pie";
/// The libraries that rustc names, and the archives that stand for them. Some linkers look at each once, from left to right, so the
/// last brings again what it needs of others. The unwinder is named as a library to load.
const LIBC: &[(&str, &[&str])] = &[
    ("libgcc_s.a", &["libgcc_eh.a", "libgcc.a"]),
    ("libutil.a", &["libutil.a"]),
    ("librt.a", &["librt.a"]),
    ("libpthread.a", &["libpthread.a"]),
    ("libm.a", &["libm.a"]),
    ("libdl.a", &["libdl.a"]),
    ("libc.a", &["libc.a", "libgcc_eh.a", "libgcc.a"]),
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CXX");
    println!("cargo::rustc-check-cfg=cfg(libc_linked_in)");
    let folder = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo names OUT_DIR"));
    let script = folder.join("sections.ld");
    fs::write(&script, SECTIONS).expect("OUT_DIR can be written to");
    println!("cargo::rustc-link-arg=-Wl,-T,{}", script.display());

    let cxx = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
    if link(&folder, &cxx, &[("libstdc++.a", &["libstdc++.a"])]) {
        println!("cargo::rustc-link-search=native={}", folder.display());
    } else {
        warn("the program will load libstdc++ when it starts, for there is no libstdc++.a");
    }
    let cc = std::env::var_os("RUSTC_LINKER").unwrap_or_else(|| "cc".into());
    let libc = folder.join("libc");
    if !starts(&folder, &cc, &[PACKED]) {
        warn("commands will start slowly, for this C library applies no packed relocations");
        return;
    }
    println!("cargo::rustc-link-arg={PACKED}");
    if starts(&folder, &cc, &[PACKED, STATIC]) && link(&libc, &cc, LIBC) {
        println!("cargo::rustc-link-arg-bins=-L{}", libc.display());
        println!("cargo::rustc-link-arg-bins={STATIC}");
        println!("cargo::rustc-cfg=libc_linked_in");
    } else {
        warn("the program will load the C library when it starts, for there is no libc.a");
    }
}

fn warn(text: &str) {
    println!("cargo::warning={text}");
}

/// Whether a program for this machine can be linked so, and runs.
fn starts(folder: &Path, cc: &OsString, flags: &[&str]) -> bool {
    let of_target = std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu")
        && std::env::var("HOST").ok() == std::env::var("TARGET").ok();
    let (source, program) = (folder.join("trial.c"), folder.join("trial"));
    let done = |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
    of_target
        && fs::write(&source, "int main(void) { return 0; }\n").is_ok()
        && done(
            Command::new(cc)
                .arg(&source)
                .arg("-o")
                .arg(&program)
                .args(flags),
        )
        && done(&mut Command::new(&program))
}

/// Makes archives in `folder` that stand for those of a compiler: the linker takes the first folder with a library in any form, and
/// one that holds the archive alone settles it. Returns whether there are all.
fn link(folder: &Path, compiler: &OsString, libraries: &[(&str, &[&str])]) -> bool {
    fs::create_dir_all(folder).expect("OUT_DIR can be written to");
    libraries.iter().all(|(name, archives)| {
        let found: Option<Vec<String>> = archives
            .iter()
            .map(|archive| find(compiler, archive))
            .collect();
        let Some(found) = found else {
            return false;
        };
        let script = format!("GROUP ( {} )\n", found.join(" "));
        let link = folder.join(name);
        // Never through a link, which may lead to an archive of the system.
        let _ = fs::remove_file(&link);
        fs::File::create_new(&link)
            .and_then(|mut file| file.write_all(script.as_bytes()))
            .expect("OUT_DIR can be written to");
        true
    })
}

/// Where a compiler keeps an archive; a bare name in its answer means that it has none.
fn find(compiler: &OsString, archive: &str) -> Option<String> {
    let answer = Command::new(compiler)
        .arg(format!("-print-file-name={archive}"))
        .output()
        .ok()?;
    let path = std::str::from_utf8(&answer.stdout).ok()?.trim().to_owned();
    if !Path::new(&path).is_absolute() {
        return None;
    }
    // Another version of the compiler has it elsewhere.
    println!("cargo::rerun-if-changed={path}");
    Some(path)
}
