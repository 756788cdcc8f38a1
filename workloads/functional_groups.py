"""Functional groups as SMARTS: a fixed list, so that an answer is a set of names from it."""

from functools import cache
from typing import Any

SMARTS = {
    "acid": "[CX3](=O)[OX2H1,OX1-]",
    "alcohol": "[OX2H][CX4]",
    "aldehyde": "[CX3H1](=O)[#6]",
    "amide": "[NX3][CX3](=[OX1])",
    "amine": "[NX3;!$(N-C=[O,S,N]);!$(N-S=O);!$(N~[O,N])][#6]",
    "azo": "[#6][NX2]=[NX2][#6]",
    "ester": "[CX3](=O)[OX2H0][#6;!$(C=O)]",
    "ether": "[OD2;!$(O-C=O)]([#6;!$(C=O)])[#6;!$(C=O)]",
    "halide": "[F,Cl,Br,I][#6]",
    "imine": "[CX3;!$(C[#7,#8,#16]);!c]=[NX2;!$(N[#7,#8])]",
    "ketone": "[#6][CX3](=O)[#6]",
    "nitrile": "[NX1]#[CX2]",
    "nitro": "[$([NX3](=O)=O),$([NX3+](=O)[O-])]",
    "phenol": "[OX2H]c",
    "phosphate": "[PX4](=O)([OX2,OX1-])([OX2,OX1-])[OX2,OX1-]",
    "sulfide": "[SX2H0]([#6])[#6]",
    "sulfonyl": "[#16X4](=[OX1])(=[OX1])",
    "thiol": "[#16X2H]",
}


@cache
def pattern(smarts: str) -> Any:
    """The RDKit query for ``smarts``, compiled once a process."""
    from rdkit import Chem

    return Chem.MolFromSmarts(smarts)


def functional_groups(mol: Any) -> list[str]:
    """The names of the groups of ``SMARTS`` that the RDKit molecule has, in alphabetical order."""
    return [name for name, smarts in SMARTS.items() if mol.HasSubstructMatch(pattern(smarts))]
