"""A stand-in for the part of ComfyUI's ``folder_paths`` that the pack uses; tests point it at temporary folders."""

from __future__ import annotations

from pathlib import Path

models_dir = ""
folder_names_and_paths: dict[str, tuple[list[str], set[str]]] = {}
filename_list_cache: dict[str, tuple[list[str], dict[str, float], float]] = {}
input_directory = output_directory = temp_directory = ""


def get_input_directory() -> str:
    """Where the user's files lie."""
    return input_directory


def get_output_directory() -> str:
    """Where results are saved."""
    return output_directory


def get_temp_directory() -> str:
    """Where previews are saved."""
    return temp_directory


def add_model_folder_path(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
    """Add a folder to a kind of models; a new kind lists files of every name."""
    folders = folder_names_and_paths.setdefault(folder_name, ([], set()))[0]
    if full_folder_path not in folders:
        folders.insert(0 if is_default else len(folders), full_folder_path)


def get_folder_paths(folder_name: str) -> list[str]:
    """The folders of a kind of models; KeyError where the kind is unknown."""
    return list(folder_names_and_paths[folder_name][0])


def get_filename_list(folder_name: str) -> list[str]:
    """The files of a kind of models, relative to its folders."""
    folders, endings = folder_names_and_paths[folder_name]
    found = [(path, Path(folder)) for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return sorted({str(path.relative_to(top)) for path, top in found if not endings or path.suffix in endings})
