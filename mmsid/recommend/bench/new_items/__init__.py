"""New-item benchmark: how well do methods recommend items that had no interactions when everything was fitted?"""
